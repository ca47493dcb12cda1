"""A plan as text for the terminal, and many plans as one Markdown table."""

import textwrap
from collections.abc import Sequence

from v2flow.cli_report import format_rows
from v2flow.planning.plan import Plan, Setting, Strategy

WIDTH = 100

PARAMETERS = {
    "trained": ("trained", "{:,.0f}"),
    "frozen": ("frozen", "{:,.0f}"),
    "buffers": ("buffers", "{:,.0f}"),
}
STEPS = {
    "share": ("share", "{:.0%}"),
    "flops": ("GFLOP", "{:,.1f}"),
    "traffic": ("GB moved", "{:,.2f}"),
    "operators": ("operators", "{:,.0f}"),
    "saved": ("GB kept", "{:,.3f}"),
    "activations": ("GB at peak", "{:,.3f}"),
}
MEMORY = {
    "weights": ("weights", "{:,.2f}"),
    "gathered": ("gathered", "{:,.2f}"),
    "gradients": ("gradients", "{:,.2f}"),
    "optimizer": ("AdamW", "{:,.2f}"),
    "ema": ("EMA", "{:,.2f}"),
    "frozen": ("frozen", "{:,.2f}"),
    "working": ("activations", "{:,.2f}"),
    "total": ("all", "{:,.2f}"),
}
TIME = {
    "sent": ("GB sent", "{:,.2f}"),
    "compute": ("compute ms", "{:,.1f}"),
    "links": ("links ms", "{:,.1f}"),
    "waiting": ("not hidden ms", "{:,.1f}"),
    "step": ("step ms", "{:,.1f}"),
    "days": ("days", "{:,.3g}"),
}


def plan_text(plan: Plan) -> str:
    """The whole plan, at most 100 columns wide."""
    blocks = [
        [_headline(plan)],
        ["Parameters", *format_rows(_parameter_rows(plan), PARAMETERS)],
        ["A batch on one device: forward and backward", *format_rows(_step_rows(plan), STEPS)],
        ["GB on one device", *format_rows({k: _memory_row(s) for k, s in plan.strategies.items()}, MEMORY)],
        ["A step", *format_rows({k: _time_row(s) for k, s in plan.strategies.items()}, TIME)],
        [*_sentences(plan)],
        ["Assumptions", *(line for text in plan.assumptions for line in _wrapped(f"- {text}", "  "))],
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _headline(plan: Plan) -> str:
    setting = plan.setting
    batch = setting.batch_size * setting.world * plan.accumulate
    known = f" of {plan.samples:,}" if plan.samples is not None else ""
    return (
        f"{plan.name}: {plan.steps:,} steps of {batch:,}{known} samples, {'bf16' if setting.bf16 else 'fp32'}, on "
        f"{_devices(setting)}"
    )


def _devices(setting: Setting) -> str:
    devices = f"{setting.devices} {setting.hardware.name}"
    return devices if setting.nodes == 1 else f"{setting.nodes} x {devices}"


def _parameter_rows(plan: Plan) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {name: dict(counts) for name, counts in plan.parts.items()}
    return rows | {"all": {kind: plan.parameters(kind) for kind in PARAMETERS}}


def _step_rows(plan: Plan) -> dict[str, dict[str, float]]:
    return {
        stage: {
            "share": cost.share,
            "flops": cost.flops / 1e9,
            "traffic": cost.traffic / 1e9,
            "operators": cost.operators,
            "saved": cost.saved / 1e9,
            "activations": cost.activations / 1e9,
        }
        for stage, cost in plan.stages.items()
    }


def _memory_row(strategy: Strategy) -> dict[str, float]:
    return {name: getattr(strategy.memory, name) / 1e9 for name in MEMORY}


def _time_row(strategy: Strategy) -> dict[str, float]:
    seconds = strategy.seconds
    return {
        "sent": strategy.sent / 1e9,
        "compute": 1000 * seconds.compute,
        "links": 1000 * seconds.communication,
        "waiting": 1000 * seconds.exposed,
        "step": 1000 * seconds.step,
        "days": strategy.days,
    }


def _sentences(plan: Plan) -> list[str]:
    lines = _wrapped(plan.verdict[0].upper() + plan.verdict[1:] + ".")
    for name, strategy in plan.strategies.items():
        seconds = strategy.seconds
        if plan.setting.world == 1:
            lines += _wrapped(f"The step takes its time for {seconds.limit}.")
            continue
        hides = (
            "hides behind the computing" if not seconds.exposed else "does not all hide behind the computing"
        )
        lines += _wrapped(f"{name}: the step takes its time for {seconds.limit}; communication {hides}.")
    return lines


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


HEADINGS = (
    "experiment", "devices", "batch", "trained", "frozen", "FLOPs a step", "activations", "AdamW", "memory", "sent",
    "step", "steps", "days", "fits",
)  # fmt: skip


def plan_table(plans: Sequence[tuple[str, Plan]]) -> str:
    """A Markdown table of plans by name; figures under DDP / FSDP2 where there are several devices.

    FLOPs are those of one device's step; bytes are GB (10⁹) on one device, or sent by it in a step.
    """
    rows = [_table_row(name, plan) for name, plan in plans]
    lines = [HEADINGS, ("---", *("---:" for _ in HEADINGS[1:])), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _table_row(name: str, plan: Plan) -> tuple[str, ...]:
    strategies = plan.strategies.values()

    def both(values: list[str]) -> str:
        return " / ".join(values)

    fitting = [name for name, strategy in plan.strategies.items() if strategy.fits]
    return (
        name,
        _devices(plan.setting),
        str(plan.setting.batch_size),
        f"{plan.parameters('trained'):,}",
        f"{plan.parameters('frozen'):,}",
        f"{plan.flops:.4g}",
        f"{max(cost.activations for cost in plan.stages.values()) / 1e9:.2f} GB",
        both([f"{s.memory.optimizer / 1e9:.2f}" for s in strategies]) + " GB",
        both([f"{s.memory.total / 1e9:.1f}" for s in strategies]) + " GB",
        both([f"{s.sent / 1e9:.2f}" for s in strategies]) + " GB",
        both([f"{1000 * s.seconds.step:.0f}" for s in strategies]) + " ms",
        f"{plan.steps:,}",
        both([f"{s.days:.2g}" for s in strategies]),
        both(fitting) if fitting else "no",
    )


def table_document(plans: Sequence[tuple[str, Plan]], command: str) -> str:
    """The table with what its figures rest on, as a Markdown file."""
    shared = [text for text in plans[0][1].assumptions if all(text in plan.assumptions for _, plan in plans)]
    own = {name: [text for text in plan.assumptions if text not in shared] for name, plan in plans}
    lines = [
        "# Plans of the experiments",
        "",
        f"Written by `{command}`; `docs/planning.md` says how the figures are made. FLOPs are those of a step on one",
        "device, GB (10⁹ bytes) are on one device or sent by it in a step; two figures are DDP / FSDP2.",
        "",
        plan_table(plans),
        "Assumed for all of them:",
        "",
        *(f"- {text}" for text in shared),
        "",
        "And beside that:",
        "",
        *(f"- {name}: {'; '.join(texts)}" for name, texts in own.items() if texts),
    ]
    return "\n".join(lines) + "\n"
