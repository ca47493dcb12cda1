"""What the probes found, in a few lines for the terminal; the whole of it is in the JSON report."""

from collections.abc import Mapping
from typing import Any

from v2flow.cli_report import format_rows


def probe_lines(report: Mapping[str, Any]) -> list[str]:
    """Lines for a report of :func:`v2flow.evaluate.evaluate_checkpoint`; none without probes."""
    found = report.get("probes", {})
    rows: dict[str, Mapping[str, float]] = {}
    for point, figures in found.get("decoding", {}).items():
        milliseconds = 1000 * figures["seconds_per_picture"]
        rows[f"{point}: {figures['field_evaluations']} evaluations, {milliseconds:.2f} ms"] = figures
    for kind, curve in found.get("robustness", {}).items():
        rows |= {f"{kind} ids for {point['share']:.0%} of the tokens": point for point in curve}
    for domain, result in found.get("domains", {}).items():
        rows |= {f"{domain}, {mode}": figures for mode, figures in result["modes"].items()}
    lines = format_rows(rows) if rows else []
    if "alignment" in found:
        lines += _alignment_lines(found["alignment"])
    for probe, notes in report.get("probe_notes", {}).items():
        lines += [f"{probe}: no {what}: {why}" for what, why in notes.items()]
    return lines


def _alignment_lines(figures: Mapping[str, Any]) -> list[str]:
    lines = [f"alignment: tokens are {figures['norm_ratio']:.3f} times as long as rows of the LLM's table"]
    for name in ("codes", "tokens", "rows", "random"):
        found = figures[name]
        text = f"{name}: nearest row at cosine {found['nearest_cosine']['mean']:.3f}"
        if "kernel_distance" in found:
            text += f", kernel distance {found['kernel_distance']:.4f} ± {found['kernel_distance_se']:.4f}"
            text += f", Fréchet distance {found['frechet_distance']:.3f}"
        lines.append(f"{text}, energy in 32 directions {found['energy_32']:.1%}")
    return lines
