"""The report of a text-to-image model as text tables for the terminal."""

from collections.abc import Mapping
from typing import Any

from v2flow.cli_report import format_rows
from v2flow.data.scenes import TASKS

_SHAPES = {name: (name, "{:.3f}") for name in (*TASKS, "overall")}
_DISTANCES = {
    "kid-efficientnet-lite0": ("kid-effnet", "{:.4f}"),
    "kid-efficientnet-lite0_se": ("±se", "{:.4f}"),
    "kid-efficientnet-lite0_above_generated": ("above gen", "{:.4f}"),
    "kid-efficientnet-lite0_above_generated_se": ("±se", "{:.4f}"),
    "pair-efficientnet-lite0": ("pair-effnet", "{:.4f}"),
    "pair-efficientnet-lite0_se": ("±se", "{:.4f}"),
    "kid-inception": ("kid-incep", "{:.5f}"),
    "kid-inception_se": ("±se", "{:.5f}"),
    "clip_score": ("clip", "{:.2f}"),
}


def text_to_image_table(report: Mapping[str, Any]) -> str:
    """The report of `evaluate_text_to_image`: the shapes score, distances with CLIPScore, and single figures."""
    lines: list[str] = []
    if "shapes" in report:
        lines += ["shapes score", *format_rows(report["shapes"] | report.get("duos", {}), _SHAPES), ""]
    distances = {name: dict(row) for name, row in report.get("distances", {}).items()}
    for name, score in report.get("clip_score", {}).items():
        distances.setdefault(name, {})["clip_score"] = score
    if distances:
        draws = report["protocol"]["draws"]
        drawn = f"{report['drawn']} captions" + (f", {draws} draws of each" if draws > 1 else "")
        lines += [drawn, *format_rows(distances, _DISTANCES), ""]
    retrieval, language = report["retrieval"], report["language"]
    lines.append(
        f"retrieval: {100 * retrieval['accuracy']:.1f} ± {100 * retrieval['accuracy_se']:.1f} % of "
        f"{retrieval['pictures']} pictures among {retrieval['ways']} captions "
        f"(chance {100 * retrieval['chance']:.2f} %)"
    )
    before = (
        f", before training {language['perplexity_before']:.1f}" if "perplexity_before" in language else ""
    )
    lines.append(f"text perplexity: {language['perplexity']:.1f}{before}")
    lines.append(
        f"image positions: {language['nats_per_token']:.3f} nats a token, text mass {language['text_mass']:.2g}"
    )
    if "memorisation" in report:
        psnr = report["memorisation"]["psnr_to_nearest_training_picture"]
        lines.append(f"nearest training picture: {psnr:.2f} dB from the generated ones")
    return "\n".join([*lines, *(f"no {name}: {reason}" for name, reason in report["notes"].items())])
