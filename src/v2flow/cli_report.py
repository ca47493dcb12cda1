"""Text tables of reports, for the terminal."""

from collections.abc import Mapping
from typing import Any

COLUMNS = {
    "psnr": ("psnr", "{:.2f}"),
    "psnr_pooled": ("pooled", "{:.2f}"),
    "ssim": ("ssim", "{:.4f}"),
    "kid-efficientnet-lite0": ("kid-effnet", "{:.4f}"),
    "kid-efficientnet-lite0_se": ("±se", "{:.4f}"),
    "rfd-efficientnet-lite0": ("rfd-effnet", "{:.1f}"),
    "lpips": ("lpips", "{:.4f}"),
    "rfid": ("rfid", "{:.3f}"),
    "kid-inception": ("kid-incep", "{:.5f}"),
}
"""Figure -> heading and format; figures that no row has are left out."""


def evaluation_table(report: Mapping[str, Any]) -> str:
    """The report of :func:`v2flow.evaluate.evaluate_checkpoint`: a row for each set of weights and decode mode."""
    rows: dict[str, Mapping[str, float]] = {}
    lines = []
    for weights, result in report["weights"].items():
        for mode, figures in result["modes"].items():
            rows[f"{weights} {mode}"] = figures
        codebook = result["codebook"]
        lines.append(
            f"{weights}: {result['images']} pictures, codebook usage {100 * codebook['usage']:.1f} % of "
            f"{codebook['size']}, perplexity {codebook['perplexity']:.1f}"
        )
    rows |= report.get("floors", {})
    notes = dict.fromkeys(
        f"no {name}: {reason}"
        for result in report["weights"].values()
        for name, reason in result.get("notes", {}).items()
    )
    return "\n".join([*format_rows(rows), *lines, *notes])


def format_rows(
    rows: Mapping[str, Mapping[str, float]], columns: Mapping[str, tuple[str, str]] = COLUMNS
) -> list[str]:
    """Lines of a table, headings first; a figure that a row lacks is a dash."""
    used = {key: column for key, column in columns.items() if any(key in row for row in rows.values())}
    table = [["", *(heading for heading, _ in used.values())]]
    for name, row in rows.items():
        table.append(
            [name, *(form.format(row[key]) if key in row else "-" for key, (_, form) in used.items())]
        )
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
