"""Next-token prediction of a picture's visual tokens, cheap where it can be.

At most positions the softmax runs over the K + 2 visual columns alone. On a share of them it runs over the whole
vocabulary, or the LLM would never learn that text does not belong into a picture; elsewhere words drawn at random can
stand for all words.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from v2flow.t2i.sequences import Sequences
from v2flow.t2i.visual_rows import VisualRows, hidden_states


@dataclass
class ImageLoss:
    """Loss of a batch, in nats a token.

    Attributes:
        total: mean negative log-likelihood of the visual tokens and `<eoi>` over the visual columns, and what the whole
            vocabulary adds to it, estimated from a share of the positions and of the words.
        visual: the same over the visual columns at every position, without gradient: comparable over shares.
        text_mass: mean probability of text at the positions with the whole vocabulary; 0 without such positions.
        hidden: last hidden states `[B, L, D]`, for further losses.
        text: the captions' own loss, where it was asked for; it is in the total with its weight.
    """

    total: Tensor
    visual: Tensor
    text_mass: Tensor
    hidden: Tensor
    text: Tensor | None = None


def image_loss(
    model: Any, rows: VisualRows, batch: Sequences, num_tokens: int, full_share: float = 0.125,
    generator: torch.Generator | None = None, full_weight: float = 1.0, sampled_words: int = 0,
) -> ImageLoss:  # fmt: skip
    """Loss of sequences with pictures of `num_tokens` visual tokens.

    Args:
        full_share: share of the image positions under the softmax over the whole vocabulary.
        generator: draws those positions, and words.
        full_weight: of what they add to the total; above 1 in a step that stands for others without such positions.
        sampled_words: text tokens from which what text costs at the other positions is estimated, the same for all;
            each position then counts once, whatever `full_weight` is. 0: they cost nothing.
    """
    hidden = run(model, rows, batch)
    states = hidden[:, -num_tokens - 2 : -1].flatten(0, 1)
    targets = batch.ids[:, -num_tokens - 1 :].flatten()
    logits = rows.visual_logits(model, states)
    negative = F.cross_entropy(logits, targets - rows.tokens.boi, reduction="none")
    visual, text_mass, total = negative.detach().mean(), negative.new_zeros(()), negative.mean()
    count, cost = round(full_share * len(targets)), None
    if sampled_words and count < len(targets):
        text = rows.sampled_log_sum_exp(model, states, sampled_words, generator)
        cost = F.softplus(text - logits.logsumexp(-1))
    del logits
    if count:
        chosen = torch.randperm(len(targets), generator=generator, device=targets.device)[:count]
        full = rows.full_vocabulary(model, states[chosen], targets[chosen])
        exact, text_mass = -full.log_probabilities - negative[chosen], full.text_mass.mean()
        # What text costs there stands for all positions: weighed by their number alone they would leave text its
        # probability in unusual states, and the export's plain head would speak it.
        if cost is not None:
            cost = cost.index_copy(0, chosen, exact)
        else:
            cost = exact if sampled_words else full_weight * exact
    if cost is not None:
        total = total + cost.mean()
    return ImageLoss(total, visual, text_mass, hidden)


def run(model: Any, rows: VisualRows, batch: Sequences) -> Tensor:
    """Last hidden states `[B, L, D]` of sequences."""
    return hidden_states(
        model,
        rows.embed(model, batch.ids),
        attention_mask=batch.mask.long(),
        position_ids=batch.positions,
        use_cache=False,
    )


@torch.no_grad()
def image_log_likelihood(model: Any, rows: VisualRows, batch: Sequences, num_tokens: int) -> Tensor:
    """Log-likelihood `[B]` in nats of each picture's visual tokens and `<eoi>` given its caption, over the visual
    columns."""
    hidden = run(model, rows, batch)[:, -num_tokens - 2 : -1]
    logits = rows.visual_logits(model, hidden).log_softmax(-1)
    targets = batch.ids[:, -num_tokens - 1 :, None] - rows.tokens.boi
    return logits.gather(-1, targets).squeeze(-1).sum(1)
