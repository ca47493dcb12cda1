"""What every probe is told, and what it gives back."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Batches = Iterable[Mapping[str, Any]]
"""Batches {"image": [B, 3, H, W] in [0, 1], "key": B strings, optional "valid": bool [B]}, to be read repeatedly."""


@dataclass(frozen=True)
class ProbeSettings:
    """How the probes of one tokenizer are run.

    Attributes:
        seed: of the decoding noise and of everything else that is drawn.
        features: also compute feature distances, where a probe has them.
        inception_weights: see :func:`v2flow.metrics.features.load_networks`.
        modes: the tokenizer's decode modes, name -> options of `decode`.
        limit: pictures of each set that a probe opens itself.
        batch_size: of the sets that a probe opens itself.
        device: of the model; for probes that open sets themselves.
        progress: show progress bars on stderr.
    """

    seed: int = 0
    features: bool = True
    inception_weights: str | Path | None = None
    modes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    limit: int = 1000
    batch_size: int = 64
    device: torch.device | None = None
    progress: bool = False


@dataclass
class Findings:
    """What a probe found.

    Attributes:
        figures: plain types, ready for JSON; empty where the probe has no question for this tokenizer.
        notes: what is absent -> why.
        protocol: how the figures came about.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
