"""The LLM's language: the captions' own next-token loss, and the perplexity of a text that no training shows."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from v2flow.t2i.extension import encode_captions
from v2flow.t2i.image_loss import run
from v2flow.t2i.sequences import Sequences
from v2flow.t2i.visual_rows import VisualRows

HELD_OUT = (
    "The harbour lay still before sunrise, and the first boats were already loaded with nets, bread and coffee.",
    "A loaf needs flour, water, salt and time; of the four, time is the one that most bakers forget to measure.",
    "When two numbers are multiplied, the order does not matter, but when one is divided by the other, it does.",
    "She had lived in the old town for thirty years and still found a street now and then that was new to her.",
    "Trees along the river slow the wind, hold the soil and give shade to the fish in the hottest weeks of summer.",
    "The committee met on Tuesday, agreed on nothing, and decided to meet again when the report would be finished.",
    "To repair a puncture, find the hole under water, dry the tube, roughen it, and wait before the patch goes on.",
    "Light from the nearest star takes more than four years to reach us, so that we see it as it was back then.",
)
"""Plain English, written for this purpose."""


def caption_loss(model: Any, rows: VisualRows, batch: Sequences, num_tokens: int, hidden: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats of the captions' ids over the whole vocabulary, a scalar.

    The first id of a caption has nothing before it and does not count; without ids that do, the loss is 0.

    Args:
        batch: sequences with pictures of `num_tokens` visual tokens, `[B, L]`.
        hidden: their last hidden states `[B, L, D]`.
    """
    stop = batch.ids.shape[1] - num_tokens - 2  # the caption ends here, before <boi>
    return -_log_probabilities(model, rows, batch, hidden, stop).sum() / max(
        int(_counted(batch, stop).sum()), 1
    )


@torch.no_grad()
def text_perplexity(
    model: Any, rows: VisualRows, llm_tokenizer: Any, texts: Sequence[str] = HELD_OUT
) -> float:
    """exp of the mean negative log-likelihood of texts, over the whole vocabulary, visual tokens included."""
    encoded = encode_captions(llm_tokenizer, texts, max_length=1 << 16)
    longest = max(map(len, encoded))
    device = rows.input.device
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in encoded], device=device)
    mask = torch.tensor(
        [[False] * (longest - len(text)) + [True] * len(text) for text in encoded], device=device
    )
    batch = Sequences(ids, mask, (mask.long().cumsum(1) - 1).clamp_min(0))
    found = _log_probabilities(model, rows, batch, run(model, rows, batch), longest)
    return math.exp(-float(found.mean()))


def _counted(batch: Sequences, stop: int) -> Tensor:
    """Which positions before `stop` - 1 are followed by an id of the same caption, bool `[B, stop - 1]`."""
    return batch.mask[:, : max(stop - 1, 0)]


def _log_probabilities(model: Any, rows: VisualRows, batch: Sequences, hidden: Tensor, stop: int) -> Tensor:
    """Of every id before `stop` that follows another one, `[n]`."""
    chosen = _counted(batch, stop)
    width = chosen.shape[1]
    targets = batch.ids[:, 1 : width + 1][chosen]
    if not len(targets):
        return hidden.new_zeros(0)
    return rows.full_vocabulary(model, hidden[:, :width][chosen], targets).log_probabilities
