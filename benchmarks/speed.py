"""How fast v2flow is: against the machine's matrix products and against the reference's way, all in one run.

    python benchmarks/speed.py --out benchmarks/results/speed/speed.json --report
    python benchmarks/speed.py --out /tmp/speed.json --parts step data --data 'data/mine/train-*.tar'
    python benchmarks/speed.py --out /tmp/smoke.json --smoke     # every part at toy sizes

Each part is warmed up, synchronised and timed in turns with what it is compared with and with a product of matrices.
A part that is finished stays in the file and is not measured again unless --again is given. Progress goes to standard
error; the last line of standard output is the document, the same as in the file.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed_parts import data, reference, report, scaling, step, vocabulary
from speed_parts.options import Options, smoke_options

from v2flow.benchmark.runs import machine
from v2flow.errors import V2FlowError
from v2flow.metrics.files import write_json
from v2flow.origin import current_commit

PARTS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "step": step.measure, "data": data.measure, "reference": reference.measure, "vocabulary": vocabulary.measure,
    "scaling": scaling.measure,
}  # fmt: skip
USED = {
    "step": {"experiment", "changes", "rounds", "hook_steps"},
    "data": {"experiment", "changes", "data", "rounds", "steps_a_round"},
    "reference": {"reference", "changes", "reference_rounds", "memory_gb"},
    "vocabulary": {"rounds", "vocabulary_tokens", "vocabulary_sizes"},
    "scaling": {"experiment", "changes", "rounds", "axes", "scaling_batch"},
}
"""Options that decide a part's figures."""


def setting_of(part: str, options: Options) -> dict[str, Any]:
    """What a part's figures depend on; another setting is another measurement."""
    return {name: value for name, value in options.plain().items() if name in USED[part] | {"smoke"}}


def measure_parts(
    wanted: list[str], options: Options, out: Path, command: list[str], again: bool
) -> dict[str, Any]:
    """Measures the parts that the file does not have yet, and writes it after each.

    Returns:
        The file's document: `parts`: name -> figures, `setting`, `command`, `commit`, `machine`, `minutes`.

    Raises:
        V2FlowError: the file has a wanted part with other options.
    """
    document: dict[str, Any] = {"parts": {}}
    if out.exists():
        document = read_document(out)
    for part in wanted:
        setting = setting_of(part, options)
        kept = document["parts"].get(part)
        if kept is not None and not again:
            if kept["setting"] != setting:
                name = next(n for n in setting if kept["setting"].get(n) != setting[n])
                raise V2FlowError(
                    f"{out}: part {part}: expected {name}={setting[name]}, found a measurement with "
                    f"{kept['setting'].get(name)}; use --again or another --out"
                )
            print(f"speed: {part} is measured already", file=sys.stderr)
            continue
        print(f"speed: {part}", file=sys.stderr)
        start = time.monotonic()
        torch.manual_seed(0)
        found = PARTS[part](options)
        document["parts"][part] = found | {
            "setting": setting, "command": command, "commit": current_commit(),
            "machine": machine(torch.get_num_threads()), "minutes": (time.monotonic() - start) / 60,
        }  # fmt: skip
        write_json(out, document)
    return document


def read_document(path: Path) -> dict[str, Any]:
    """The document of an earlier run.

    Raises:
        V2FlowError: the file is something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        known = all("setting" in part for part in document["parts"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise V2FlowError(
            f"option --out: {path}: expected a document of this script, found another file ({error}); name another"
        ) from error
    if not known:
        raise V2FlowError(f"option --out: {path}: expected parts with their settings; name another file")
    return document


def write_report(document: dict[str, Any], folder: Path) -> None:
    """README.md and, where scaling was measured, its plots."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(report.markdown(document), encoding="utf-8")
    if "scaling" in document["parts"]:
        for name, picture in report.plots(document["parts"]["scaling"]).items():
            (folder / name).write_text(picture + "\n", encoding="utf-8")


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    full = Options()
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON document")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--again", action="store_true", help="measure parts again that the file has")
    parser.add_argument("--report", action="store_true", help="write README.md and plots beside the file")
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    parser.add_argument("--experiment", type=Path, metavar="FILE", help=f"default: {full.experiment}")
    parser.add_argument("--reference", type=Path, metavar="FILE", help=f"default: {full.reference}")
    parser.add_argument(
        "--data", metavar="SHARDS", help="training shards of the part data; default: the experiment's"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help=f"default: {full.rounds}")
    parser.add_argument("--reference-rounds", type=int, metavar="N", help=f"default: {full.reference_rounds}")
    parser.add_argument("--memory-gb", type=float, metavar="GB", help="most that the part reference may take; default: "
                        f"{full.memory_gb:g}")  # fmt: skip
    parser.add_argument("--change", action="append", dest="changes", metavar="OPTION=VALUE",
                        help="an option of the experiments, as for v2flow fit; may be repeated")  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's")
    return parser.parse_args(words)


def options_of(arguments: argparse.Namespace) -> Options:
    """What the command line says.

    Raises:
        V2FlowError: a number below 1.
    """
    names = ("experiment", "reference", "data", "rounds", "reference_rounds", "memory_gb", "changes")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    for name in ("rounds", "reference_rounds", "memory_gb", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise V2FlowError(f"option --{name.replace('_', '-')}: expected at least 1, found {value:g}")
    given |= {"changes": tuple(given["changes"])} if "changes" in given else {}
    return smoke_options(**given) if arguments.smoke else Options(**given)


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    command = ["python", "benchmarks/speed.py", *(sys.argv[1:] if words is None else words)]
    try:
        options = options_of(arguments)
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        document = measure_parts(arguments.parts, options, arguments.out, command, arguments.again)
        if arguments.report:
            write_report(document, arguments.out.parent)
    except V2FlowError as error:
        print(f"speed: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(document, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
