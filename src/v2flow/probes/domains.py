"""How far a tokenizer carries beyond what it was trained on: pictures of other domains."""

from typing import Any

from v2flow.cross_domain import default_domains, evaluate_domains
from v2flow.evaluate import FOLDER_MODES
from v2flow.probes.findings import Batches, Findings, ProbeSettings


def score_domains(model: Any, loader: Batches, settings: ProbeSettings | None = None) -> Findings:
    """Scores a tokenizer on the domains whose pictures are there, see :func:`v2flow.cross_domain.evaluate_domains`.

    Args:
        loader: not read: the domains have pictures of their own.

    Returns:
        Domain -> the evaluation's figures and protocol.
    """
    settings = settings or ProbeSettings()
    domains = default_domains()
    if not domains:
        return Findings(notes={"domains": "no pictures found; build some with `v2flow data domains`"})
    figures = evaluate_domains(
        model, domains, settings.modes or FOLDER_MODES, limit=settings.limit, batch_size=settings.batch_size,
        features=settings.features, seed=settings.seed, inception_weights=settings.inception_weights,
        device=settings.device, progress=settings.progress,
    )  # fmt: skip
    return Findings(figures)
