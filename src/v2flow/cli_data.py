"""`v2flow data …`: build shards of pictures, and check any shards."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from v2flow.cli_data_latents import add_latents_verb
from v2flow.cli_words import sentence
from v2flow.errors import V2FlowError


def add_data_verbs(verbs: Any) -> None:
    """Adds `data` and its verbs to the subparsers of `v2flow`."""
    summary = "build and check WebDataset shards"
    data = verbs.add_parser("data", help=summary, description=sentence(summary))
    kinds = data.add_subparsers(dest="kind", metavar="KIND", required=True)
    _add_openmoji(kinds)
    _add_folder(kinds)
    _add_cifar10(kinds)
    _add_domains(kinds)
    _add_shapes(kinds)
    _add_tokens(kinds)
    add_latents_verb(kinds)
    validate = _add_kind(kinds, "validate", run_validate, "counts, sizes and bad members of shards")
    validate.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="files or URLs, with braces or wildcards"
    )
    validate.add_argument(
        "--allow-pipe", action="store_true", help="accept shards `pipe:COMMAND`, which run a shell command"
    )
    validate.add_argument("--json", type=Path, metavar="FILE", help="also write the findings here")
    validate.add_argument("--processes", type=int, default=2, metavar="N", help="default: 2")


def _add_openmoji(kinds: Any) -> None:
    parser = _add_kind(kinds, "openmoji", run_openmoji, "captioned OpenMoji pictures, split by group")
    default = Path("data/openmoji")
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help="default: data/openmoji")
    parser.add_argument("--size", type=int, default=128, metavar="PX", help="side of a picture; default: 128")
    parser.add_argument("--limit", type=int, metavar="N", help="only N pictures, for a quick look")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the counts here")


def _add_folder(kinds: Any) -> None:
    parser = _add_kind(
        kinds, "folder", run_folder, "shards of a folder of pictures, with or without captions"
    )
    parser.add_argument("source", type=Path, metavar="DIR", help="pictures, also in subfolders")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument(
        "--captions",
        type=Path,
        metavar="CSV",
        help="columns file and caption; without it, NAME.txt beside NAME.jpg",
    )
    parser.add_argument("--val-fraction", type=float, default=0.05, metavar="SHARE", help="default: 0.05")
    parser.add_argument("--test-fraction", type=float, default=0.05, metavar="SHARE", help="default: 0.05")
    parser.add_argument(
        "--split-by",
        choices=("key", "folder"),
        default="key",
        help="what stays in one split; default: key, a picture",
    )
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--max-bad", type=int, metavar="N", help="more undecodable pictures are an error")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write counts and bad pictures here")


def _add_cifar10(kinds: Any) -> None:
    parser = _add_kind(kinds, "cifar10", run_cifar10, "CIFAR-10 from the archive that its authors offer")
    parser.add_argument("archive", type=Path, metavar="ARCHIVE", help="cifar-10-binary.tar.gz")
    default = Path("data/cifar10")
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help="default: data/cifar10")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the counts here")


def _add_domains(kinds: Any) -> None:
    summary = "test patches of medical and satellite pictures and of faces, from files that packages ship"
    parser = _add_kind(kinds, "domains", run_domains, summary)
    default = Path("data/domains")
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help="default: data/domains")
    parser.add_argument("--size", type=int, default=32, metavar="PX", help="side of a patch; default: 32")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these domains; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the counts here")


def _add_tokens(kinds: Any) -> None:
    summary = "token ids of captioned pictures, encoded once for the training of stage 2"
    parser = _add_kind(kinds, "tokens", run_tokens, summary)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a .ckpt file of `v2flow fit`, or a folder of `v2flow export`",
    )
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="SHARDS", help="captioned shards train-*, val-*, test-*"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="pictures at a time; default: 64"
    )
    parser.add_argument(
        "--views", type=int, default=1, metavar="N",
        help="of each training picture: itself, then moved by up to a sixteenth of its side and, where its caption "
        "speaks of no sides or writing, mirrored; default: 1",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="loader processes")
    parser.add_argument(
        "--allow-pipe", action="store_true", help="accept shards `pipe:COMMAND`, which run a shell command"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the counts here")


def _add_shapes(kinds: Any) -> None:
    summary = "captioned scenes of coloured shapes; test captions name combinations that training never shows"
    parser = _add_kind(kinds, "shapes", run_shapes, summary)
    default = Path("data/shapes")
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help="default: data/shapes")
    for split, count in (("train", 60000), ("val", 1200), ("test", 1200)):
        help = f"pictures in {split}; default: {count}"
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N", help=help)
    parser.add_argument("--size", type=int, default=32, metavar="PX", help="side of a picture; default: 32")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples; default: 0")
    parser.add_argument(
        "--held-out",
        choices=("whole", "pairs"),
        default="whole",
        help="what training never shows, beside some pairs of shapes: wholes such as two red bars, a red bar alone "
        "at the top left or a bar above a square, or pairs of colour and shape; default: whole",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the counts here")


def _add_kind(kinds: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=summary, description=sentence(summary))
    parser.set_defaults(run=run)
    return parser


def run_openmoji(options: argparse.Namespace) -> None:
    """`v2flow data openmoji`."""
    from v2flow.data.openmoji import build_openmoji

    counts = build_openmoji(options.out, options.size, options.processes, options.limit)
    _report_counts(options, counts)


def run_folder(options: argparse.Namespace) -> None:
    """`v2flow data folder`."""
    from v2flow.data.folder import build_folder

    report = build_folder(
        options.source,
        options.out,
        captions=options.captions,
        val_fraction=options.val_fraction,
        test_fraction=options.test_fraction,
        split_by=options.split_by,
        samples_per_shard=options.samples_per_shard,
        processes=options.processes,
        max_bad=options.max_bad,
    )
    _write(options.json, asdict(report))
    print(f"{report}\n{options.out}")


def run_cifar10(options: argparse.Namespace) -> None:
    """`v2flow data cifar10`."""
    from v2flow.data.cifar10 import build_cifar10

    _report_counts(options, build_cifar10(options.archive, options.out))


def run_domains(options: argparse.Namespace) -> None:
    """`v2flow data domains`."""
    from v2flow.data.domains import build_domains

    reports = build_domains(options.out, options.size, options.only)
    _write(options.json, {"domains": {name: asdict(report) for name, report in reports.items()}})
    for name, report in reports.items():
        print(f"{name}: {report.patches} patches, {report.blank} blank ones left out: {options.out / name}")


def run_tokens(options: argparse.Namespace) -> None:
    """`v2flow data tokens`."""
    from v2flow.data.tokens import build_tokens

    counts = build_tokens(
        options.checkpoint, options.data, options.out, options.batch_size, options.workers, options.allow_pipe,
        options.views,
    )  # fmt: skip
    _report_counts(options, counts)


def run_shapes(options: argparse.Namespace) -> None:
    """`v2flow data shapes`."""
    from v2flow.data.shapes import build_shapes

    counts = build_shapes(
        options.out,
        options.train,
        options.val,
        options.test,
        size=options.size,
        seed=options.seed,
        level=options.held_out,
    )
    _report_counts(options, counts)


def run_validate(options: argparse.Namespace) -> None:
    """`v2flow data validate`.

    Raises:
        V2FlowError: the shards are not in order; what is wrong was printed.
    """
    from v2flow.data.validate import validate_shards

    report = validate_shards(options.shards, allow_pipe=options.allow_pipe, processes=options.processes)
    _write(options.json, report.to_dict())
    print(report)
    if not report.ok:
        raise V2FlowError(
            f"shards: {len(report.bad_shards)} bad shards, {len(report.bad_members)} bad members, "
            f"{len(report.duplicate_keys)} duplicate keys in {report.samples} samples; see the list above"
        )


def _report_counts(options: argparse.Namespace, counts: dict[str, int]) -> None:
    _write(options.json, {"samples": counts})
    print(", ".join(f"{count} {split}" for split, count in counts.items()) + f": {options.out}")


def _write(path: Path | None, value: dict[str, Any]) -> None:
    if path is not None:
        from v2flow.metrics.files import write_json

        write_json(path, value)
