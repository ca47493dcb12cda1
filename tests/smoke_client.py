"""`v2flow` and `python` of a folder in which the documents' commands run: `v2flow`, and Python from the standard input,
go to `smoke_server.py`.

Usage: `python smoke_client.py SOCKET COMMAND WORDS…`; any other Python program is run as it stands.
"""

import json
import os
import socket
import sys

_, path, command, *words = sys.argv
if os.path.basename(command) != "v2flow":
    if words[:2] == ["-m", "v2flow"]:
        words = words[2:]
    elif words != ["-"]:
        os.execv(sys.executable, [sys.executable, *words])
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(path)
    request = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
    sys.exit(connection.recv(1)[0])
