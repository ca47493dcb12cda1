"""Probes: what is asked of a trained tokenizer beyond its reconstructions."""

from collections.abc import Callable, Sequence
from typing import Any

from v2flow.errors import V2FlowError
from v2flow.probes.alignment import measure_alignment
from v2flow.probes.decoding import sweep_decoding
from v2flow.probes.domains import score_domains
from v2flow.probes.findings import Batches, Findings, ProbeSettings
from v2flow.probes.robustness import measure_robustness

__all__ = ["PROBES", "Findings", "ProbeSettings", "check_probes", "run_probes"]

PROBES: dict[str, Callable[..., Findings]] = {
    "decoding": sweep_decoding,
    "robustness": measure_robustness,
    "alignment": measure_alignment,
    "domains": score_domains,
}
"""Name -> function of (model, loader, settings=…)."""


def check_probes(names: Sequence[str], weights: Sequence[str] = ("ema",), limit: int = 1000) -> None:
    """Refuses names that no probe has, and probes of raw weights alone or of no picture.

    Raises:
        V2FlowError: names the option, and what was expected.
    """
    if names and set(weights) == {"raw"}:
        raise V2FlowError("option probes: expected averaged weights to put them to, found raw alone; add ema")
    if names and limit < 1:
        raise V2FlowError(f"option probe_limit: expected at least 1 picture, found {limit}")
    for name in names:
        if name not in PROBES:
            raise V2FlowError(f"option probes: unknown probe {name!r}; expected some of {', '.join(PROBES)}")


def run_probes(
    names: Sequence[str], model: Any, loader: Batches, settings: ProbeSettings | None = None
) -> dict[str, dict[str, Any]]:
    """Puts the named probes to a tokenizer, one after the other; in one process.

    Args:
        model: a tokenizer with `encode`, `decode` and `codebook_size`, on its device.
        loader: its pictures; read at least once for each probe.

    Returns:
        `probes`: name -> figures, see each probe's function; `probe_notes`: name -> what is absent -> why;
        `probe_protocols`: name -> protocol. A probe that has no question for this tokenizer is in the notes alone.

    Raises:
        V2FlowError: an unknown name, or no picture.
    """
    check_probes(names)
    found = {name: PROBES[name](model, loader, settings=settings or ProbeSettings()) for name in names}
    return {
        "probes": {name: findings.figures for name, findings in found.items() if findings.figures},
        "probe_notes": {name: findings.notes for name, findings in found.items() if findings.notes},
        "probe_protocols": {name: findings.protocol for name, findings in found.items() if findings.protocol},
    }
