"""The verb `v2flow plan`."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v2flow.errors import V2FlowError

if TYPE_CHECKING:
    from v2flow.planning.experiment import Experiment
    from v2flow.planning.hardware import Hardware
    from v2flow.planning.plan import Plan, Setting

EXPERIMENTS = ("experiments/tokenizer", "experiments/t2i")

_DESCRIPTION = """\
What a training would take, before there is a GPU, a picture or a weight:
parameters by part, FLOPs of a step, bytes on one device under DDP and under
FSDP2, bytes that devices send each other, and days for the steps of the
recipe. The model is built from its sizes alone and one step is followed on
tensors without contents. What could not be known is listed below the figures
as an assumption."""

_EPILOG = """\
examples:
  v2flow plan --config experiments/tokenizer/reference-512.yaml \\
    --device h100 --devices 8 --nodes 4
  v2flow plan --config experiments/t2i/reference-llama2-7b.yaml \\
    --device a100-40gb --utilisation 0.4 --json plan.json
  v2flow plan --config experiments/tokenizer/openmoji-32.yaml --device cpu
  v2flow plan --all --out benchmarks/results/plans/README.md"""


_FIGURES = (
    "devices", "nodes", "tflops", "memory_gb", "memory_bandwidth", "node_bandwidth", "network_bandwidth", "utilisation",
    "precision", "batch_size", "caption_tokens", "draws",
)  # fmt: skip
"""Options that change what is planned, beside the experiments and the device."""


def add_plan_verb(verbs: Any) -> None:
    """Adds the verb to the subparsers of `v2flow`."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "plan",
        help="what a training would take: memory, FLOPs, communication, days",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="an experiment file; may be repeated",
    )
    parser.add_argument(
        "--all", action="store_true", help=f"every experiment file of {' and '.join(EXPERIMENTS)}"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE",
        help="change an option of the experiment, as in --set model.init_args.tokenizer.decoder.width=512; may be "
        "repeated",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FILE.md", help="also write one Markdown table of all plans"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures here")
    _add_hardware_options(parser)
    _add_training_options(parser)
    parser.set_defaults(run=run_plan)


def _add_hardware_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--device", default="h100", metavar="NAME",
        help="v100, a100-40gb, a100-80gb, h100, h200, l40s, rtx4090, mi300x, or cpu: this machine, whose rates are "
        "measured; default: h100",
    )  # fmt: skip
    group.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="devices of a node; default: the experiment's, 8 if it says auto",
    )
    group.add_argument("--nodes", type=int, metavar="N", help="nodes; default: the experiment's")
    for option, help_ in (
        ("--tflops", "peak of products in the precision of the plan, TFLOP/s"),
        ("--memory-gb", "memory of a device, GB"),
        ("--memory-bandwidth", "of that memory, GB/s"),
        ("--node-bandwidth", "between the devices of a node, GB/s a device and direction"),
        ("--network-bandwidth", "between nodes, GB/s a device and direction"),
    ):
        group.add_argument(option, type=float, metavar="X", help=f"{help_}; default: the device's")


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--utilisation", type=float, metavar="SHARE",
        help="share of the peak that products reach; default: 0.35, and 1 of the measured rate with --device cpu",
    )  # fmt: skip
    group.add_argument(
        "--precision", choices=("bf16", "fp32"), help="default: the experiment's, and fp32 with --device cpu"
    )
    group.add_argument(
        "--batch-size", type=int, metavar="N", help="samples of a device and step; default: the experiment's"
    )
    group.add_argument(
        "--caption-tokens", type=int, metavar="N",
        help="LLM ids of a caption, of text-to-image experiments; default: as many as a caption may have",
    )  # fmt: skip
    group.add_argument(
        "--draws", type=int, default=1, metavar="N",
        help="steps that FLOPs are a mean of, where random masks decide on them; default: 1",
    )  # fmt: skip


def run_plan(options: argparse.Namespace) -> None:
    """Plans one experiment or many, prints what each takes, and writes table and figures."""
    paths = [*options.config, *(_all_experiments() if options.all else [])]
    if not paths:
        raise V2FlowError("option --config: expected an experiment file, found none; name one, or take --all")
    if options.draws < 1:
        raise V2FlowError(f"option --draws: expected at least 1, found {options.draws}")
    from v2flow.cli_progress import progress_bar
    from v2flow.planning.experiment import read_experiment
    from v2flow.planning.plan import plan_experiment
    from v2flow.planning.report import plan_text

    hardware = _hardware(options)
    plans: list[tuple[str, Plan]] = []
    with progress_bar("plan", total=2 * len(paths), unit="part") as bar:
        for path in paths:
            experiment = read_experiment(path, options.set)
            bar.update()
            setting = _setting(options, experiment, hardware)
            tokens = options.caption_tokens if experiment.text_to_image or not options.all else None
            plan = plan_experiment(experiment, setting, tokens, options.draws)
            bar.write(("\n\n" if plans else "") + plan_text(plan))
            bar.update()
            plans.append((f"{path.resolve().parent.name}/{path.stem}", plan))
    _write(options, plans)


def _write(options: argparse.Namespace, plans: "list[tuple[str, Plan]]") -> None:
    from v2flow.metrics.files import write_atomically, write_json
    from v2flow.planning.report import table_document

    if options.json is not None:
        write_json(options.json, {name: plan.document() for name, plan in plans})
    if options.out is not None:
        text = table_document(plans, _command(options))
        write_atomically(options.out, lambda file: file.write(text.encode()))
        print(f"\nv2flow: table {options.out}")


def _command(options: argparse.Namespace) -> str:
    """The command that the figures are of, without where they are written to."""
    words = ["v2flow", "plan", *(["--all"] if options.all else [])]
    words += [word for path in options.config for word in ("--config", str(path))]
    words += ["--device", options.device]
    for name in _FIGURES:
        value = getattr(options, name)
        if value is not None and not (name == "draws" and value == 1):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words + [word for change in options.set for word in ("--set", change)])


def _all_experiments() -> list[Path]:
    found = [path for folder in EXPERIMENTS for path in sorted(Path(folder).glob("*.yaml"))]
    if not found:
        raise V2FlowError(
            f"option --all: expected experiment files in {' and '.join(EXPERIMENTS)}, found none; run it in the "
            "project's folder, or name files with --config"
        )
    return found


def _hardware(options: argparse.Namespace) -> "Hardware":
    from v2flow.planning.hardware import CPU, find_hardware, override, this_cpu

    figures = {"memory_gb": options.memory_gb, "memory_bandwidth": options.memory_bandwidth,
               "node_bandwidth": options.node_bandwidth, "network_bandwidth": options.network_bandwidth}  # fmt: skip
    rates = {"bf16_tflops": options.tflops, "fp32_tflops": options.tflops}
    if options.device != CPU:
        return override(find_hardware(options.device), **figures, **rates)
    from v2flow.planning.rates import measured_bandwidth, measured_tflops

    tflops = measured_tflops() if options.tflops is None else options.tflops
    bandwidth = measured_bandwidth() if options.memory_bandwidth is None else options.memory_bandwidth
    return override(this_cpu(tflops, bandwidth), **figures, **rates)


def _setting(options: argparse.Namespace, experiment: "Experiment", hardware: "Hardware") -> "Setting":
    from v2flow.planning.hardware import CPU
    from v2flow.planning.plan import UTILISATION, Setting

    cpu = hardware.name == CPU
    bf16 = experiment.bf16 and not cpu if options.precision is None else options.precision == "bf16"

    def chosen(given: Any, otherwise: Any) -> Any:
        return otherwise if given is None else given

    return Setting(
        hardware=hardware,
        devices=chosen(options.devices, 1 if cpu else experiment.devices),
        nodes=chosen(options.nodes, 1 if cpu else experiment.nodes),
        bf16=bf16,
        batch_size=chosen(options.batch_size, experiment.batch_size),
        utilisation=chosen(options.utilisation, 1.0 if cpu else UTILISATION),
    )
