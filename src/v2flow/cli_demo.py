"""The verb `demo`: a web page to try a tokenizer."""

import argparse
import socket
from typing import Any

from v2flow.cli_words import sentence
from v2flow.errors import V2FlowError, missing


def add_demo_verb(verbs: Any) -> None:
    """Adds the verb to the subparsers of `v2flow`."""
    summary = "a web page to try a tokenizer: tokens in words, pictures filling in"
    parser = verbs.add_parser("demo", help=summary, description=sentence(summary))
    parser.set_defaults(run=run_demo)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a V2Flow tokenizer: a .ckpt file of `v2flow fit`, or a folder of `v2flow export`",
    )
    parser.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="of a .ckpt file; default: ema"
    )
    parser.add_argument(
        "--text-to-image", metavar="CHECKPOINT", help="also draw captions, by this text-to-image model"
    )
    parser.add_argument(
        "--baseline", metavar="CHECKPOINT", help="show the pictures of this tokenizer beside the others"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine only"
    )
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument(
        "--max-upload", type=int, default=10, metavar="MB", help="largest picture file; default: 10"
    )


def run_demo(options: argparse.Namespace) -> None:
    """`v2flow demo`."""
    if options.max_upload < 1:
        raise V2FlowError(f"option --max-upload: expected at least 1 MB, found {options.max_upload}")
    check_address(options.host, options.port)  # refused before a model is loaded
    try:
        from v2flow.demo.app import launch
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "v2flow":
            raise
        raise V2FlowError(f"the demo {missing(error.name, 'demo')}") from error
    from v2flow.demo.session import load_session

    session = load_session(options.checkpoint, options.weights, options.text_to_image, options.baseline)
    launch(session, options.host, options.port, options.max_upload)


def check_address(host: str, port: int) -> None:
    """Refuses an address that cannot be listened on.

    Raises:
        V2FlowError: another program has the port, or the address is none of this machine's.
    """
    if not 1 <= port <= 65535:
        raise V2FlowError(f"option --port: expected a number from 1 to 65535, found {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:  # the latter of names that cannot be any host's
        reason = getattr(error, "strerror", None) or "no host name"
        raise V2FlowError(
            f"options --host and --port: cannot listen on {host} port {port} ({reason}); name others"
        ) from error
