"""This machine alone: tests, and the commands that they start, must not use the network; and its free ports."""

import random
import socket
from typing import Any

LOOPBACK = ("127.", "::1", "localhost")
_connect = socket.socket.connect


def connect_here(self: socket.socket, address: Any) -> None:
    """In the place of `socket.socket.connect`: a connection to anything but this machine is an error."""
    internet = self.family in (socket.AF_INET, socket.AF_INET6)
    if internet and not str(address[0]).startswith(LOOPBACK):
        raise RuntimeError(f"tests must not use the network, but one connects to {address[0]}")
    _connect(self, address)


def free_port() -> int:
    """A port of this machine that nothing listens on.

    Not one of those that the system gives to outgoing connections: other tests' would take it before it is used.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
