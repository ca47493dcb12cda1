"""`v2flow data …`: build shards of pictures, and check any shards."""

import argparse
from pathlib import Path
from typing import Any


def add_data_verbs(verbs: Any) -> None:
    """Adds `data` and its verbs to the subparsers of `v2flow`."""
    summary = "build and check WebDataset shards"
    data = verbs.add_parser("data", help=summary, description=summary.capitalize() + ".")
    kinds = data.add_subparsers(dest="kind", metavar="KIND", required=True)

    openmoji = _add_kind(kinds, "openmoji", run_openmoji, "captioned OpenMoji pictures, split by group")
    openmoji.add_argument(
        "--out", type=Path, default=Path("data/openmoji"), metavar="DIR", help="default: %(default)s"
    )
    openmoji.add_argument(
        "--size", type=int, default=128, metavar="PX", help="side of a picture; default: 128"
    )

    folder = _add_kind(
        kinds, "folder", run_folder, "shards of a folder of pictures, with or without captions"
    )
    folder.add_argument(
        "source", type=Path, metavar="DIR", help="pictures, in subfolders too; captions in NAME.txt"
    )
    folder.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the shards")

    validate = _add_kind(kinds, "validate", run_validate, "counts, sizes and bad members of shards")
    validate.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="tar files or URLs; brace globs are expanded"
    )
    validate.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")


def _add_kind(kinds: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(
        name, help=summary, description=summary.capitalize() + "."
    )
    parser.set_defaults(run=run)
    return parser


def run_openmoji(options: argparse.Namespace) -> None:
    """`v2flow data openmoji`."""


def run_folder(options: argparse.Namespace) -> None:
    """`v2flow data folder`."""


def run_validate(options: argparse.Namespace) -> None:
    """`v2flow data validate`."""
