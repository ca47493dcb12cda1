"""What a row costs: step time, memory, speed of coding, and ratios to the reference (`v2flow.benchmark.overhead`)."""

from collections.abc import Callable, Mapping
from typing import Any

from v2flow.benchmark.document import ABSENT, Block, Section, Table

Cost = Mapping[str, Any]


def overhead_section(results: Mapping[str, Any]) -> Section | None:
    """The measured costs of the rows; None where nothing was measured."""
    overhead = results.get("overhead") or {}
    if not overhead:
        return None
    decoders = list(dict.fromkeys(m for cost in overhead.values() for m in _decoders(cost)))
    columns: dict[str, Callable[[Cost], str]] = {
        "parameters, M": lambda cost: number(cost.get("parameters"), 1e-6, "{:.2f}"),
        "step, ms": lambda cost: number(cost.get("step_seconds"), 1e3, "{:.0f}"),
        "step, GFLOP": lambda cost: number(cost.get("step_flops"), 1e-9, "{:.1f}"),
        "peak memory, MB": lambda cost: number(cost.get("peak_memory_bytes"), 1e-6, "{:.0f}"),
        "encode, pictures/s": lambda cost: number(cost.get("encode_images_per_second"), 1, "{:.0f}"),
        "generate, pictures/s": lambda cost: number(cost.get("generate_images_per_second"), 1, "{:.1f}"),
    } | {f"decode {mode}, pictures/s": _decoder(mode) for mode in decoders}
    blocks: list[Block] = [
        _table({name: {key: get(cost) for key, get in columns.items()} for name, cost in overhead.items()}),
        "Medians, and in brackets the quartiles over the repetitions.",
    ]
    ratios = {name: _ratios(cost) for name, cost in overhead.items()}
    if any(ratios.values()):
        reference = next(iter(overhead.values())).get("reference") or "the first row"
        blocks += [
            f"Ratios to {reference}; of time below 1 is cheaper, of speed above 1 is faster:",
            _table(ratios),
        ]
    return Section("What a row costs", blocks)


def number(value: Any, factor: float, form: str) -> str:
    """A number, or `median (low-high)` of a spread, times `factor`; a dash when it was not measured."""
    if value is None:
        return ABSENT
    if not isinstance(value, Mapping):
        return form.format(value * factor)
    median, low, high = (form.format(value[key] * factor) for key in ("median", "low", "high"))
    return median if low == high else f"{median} ({low}–{high})"


def _ratios(cost: Cost) -> dict[str, str]:
    """Figures `…_ratio`, also those of each decode mode, by heading."""
    ratios: dict[str, Any] = {}
    for key, value in cost.items():
        if not key.endswith("_ratio"):
            continue
        name = key.removesuffix("_ratio").replace("_", " ")
        by_mode = isinstance(value, Mapping) and "median" not in value
        ratios |= {f"{name} {mode}": v for mode, v in value.items()} if by_mode else {name: value}
    return {name: number(value, 1, "{:.2f}") for name, value in ratios.items()}


def _decoders(cost: Cost) -> Mapping[str, Any]:
    return cost.get("decode_images_per_second") or {}


def _decoder(mode: str) -> Callable[[Cost], str]:
    return lambda cost: number(_decoders(cost).get(mode), 1, "{:.0f}")


def _table(rows: Mapping[str, Mapping[str, str]]) -> Table:
    """One line a row; columns that are empty throughout are left out."""
    columns = dict.fromkeys(name for cells in rows.values() for name, text in cells.items() if text != ABSENT)
    lines = [[name, *(cells.get(column, ABSENT) for column in columns)] for name, cells in rows.items()]
    return Table(["row", *columns], lines)
