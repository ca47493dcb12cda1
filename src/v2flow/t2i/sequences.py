"""Captions and pictures as one sequence of LLM ids: caption, `<boi>`, N visual tokens, `<eoi>`.

Sequences are padded on the left, so that the image part lies at the same places in every row of a batch and a batch
of captions can be continued together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from v2flow.t2i.extension import VisualTokens, encode_captions


@dataclass(frozen=True)
class Sequences:
    """A batch of sequences.

    Attributes:
        ids: LLM ids `[B, L]`; padding is 0 and masked.
        mask: true where there is no padding, `[B, L]` bool.
        positions: index of each id within its row without padding, `[B, L]` long; 0 on padding.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor


def caption_ids(llm_tokenizer: Any, captions: Sequence[str | None], max_length: int) -> list[list[int]]:
    """LLM ids of captions; None is no caption at all, as caption dropout and guidance have it: only the tokenizer's
    beginning-of-sequence token, if it sets one.

    Raises:
        V2FlowError: an empty caption, or one longer than `max_length`.
    """
    given = [caption for caption in captions if caption is not None]
    encoded = iter(encode_captions(llm_tokenizer, given, max_length))
    bos = llm_tokenizer.bos_token_id
    nothing = [bos] if bos is not None and bos in llm_tokenizer("").input_ids else []
    return [list(nothing) if caption is None else next(encoded) for caption in captions]


def join(captions: Sequence[Sequence[int]], tokens: VisualTokens, ids: Tensor | None = None) -> Sequences:
    """Sequences of captions and, for training, of their pictures.

    Args:
        captions: LLM ids of each caption.
        ids: visual token ids `[B, N]` in [0, K); None ends every sequence at `<boi>`, where an image begins.

    Returns:
        `[B, T + 1]` or, with pictures, `[B, T + N + 2]`, T being the longest caption.
    """
    longest = max(len(caption) for caption in captions)
    device = ids.device if ids is not None else torch.device("cpu")
    rows = torch.zeros(len(captions), longest + 1, dtype=torch.long)
    mask = torch.zeros(rows.shape, dtype=torch.bool)
    for row, caption in enumerate(captions):
        start = longest - len(caption)
        rows[row, start:] = torch.tensor([*caption, tokens.boi])
        mask[row, start:] = True
    rows, mask = rows.to(device), mask.to(device)
    if ids is not None:
        end = rows.new_full((len(rows), 1), tokens.eoi)
        rows = torch.cat([rows, ids + tokens.first, end], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(rows), ids.shape[1] + 1)], dim=1)
    return Sequences(rows, mask, (mask.long().cumsum(1) - 1).clamp_min(0))
