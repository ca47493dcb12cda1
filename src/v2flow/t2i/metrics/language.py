"""How much of the LLM's text would leak into pictures."""

from typing import Any

import torch

from v2flow.t2i.metrics.samples import CaptionedSamples
from v2flow.tokenizer import inference


@torch.no_grad()
def image_positions(model: Any, samples: CaptionedSamples, batch_size: int = 16) -> dict[str, float]:
    """Figures at the image positions of all samples, `<eoi>` included.

    Returns:
        `text_mass`: mean probability of text over the whole vocabulary, in [0, 1]; `nats_per_token`: mean negative
        log-likelihood over the visual columns.
    """
    totals = {"text_mass": 0.0, "nats_per_token": 0.0}
    with inference(model):
        for start in range(0, len(samples), batch_size):
            captions, ids = (
                samples.captions[start : start + batch_size],
                samples.ids[start : start + batch_size],
            )
            loss = model.loss(captions, ids, full_share=1.0)
            totals["text_mass"] += loss.text_mass.item() * len(ids)
            totals["nats_per_token"] += loss.visual.item() * len(ids)
    return {name: total / len(samples) for name, total in totals.items()}
