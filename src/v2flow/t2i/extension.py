"""Visual tokens in an LLM's vocabulary: `<boi>`, `<v_0>` … `<v_{K-1}>`, `<eoi>`.

The tokenizer alone decides their ids: its next free ones. The embedding matrix may be longer than the tokenizer
(Qwen and Phi pad it: the visual tokens take over padding rows), as long, or shorter (some Gemma releases).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from v2flow.errors import V2FlowError

BOI, EOI = "<boi>", "<eoi>"


def visual_token(index: int) -> str:
    """The string of visual token `index` of the visual vocabulary."""
    return f"<v_{index}>"


@dataclass(frozen=True)
class VisualTokens:
    """Ids of the visual tokens in the LLM's vocabulary, contiguous: boi, first, …, first + num_visual - 1, eoi.

    Attributes:
        boi: id of `<boi>`, after which an image begins.
        first: id of `<v_0>`; id k of a V2Flow tokenizer is `first + k`.
        eoi: id of `<eoi>`, which ends an image.
        num_visual: size K of the visual vocabulary.
    """

    boi: int
    first: int
    eoi: int
    num_visual: int

    @property
    def rows(self) -> slice:
        """The K + 2 rows of the embedding matrix."""
        return slice(self.boi, self.eoi + 1)

    def contains(self, ids: Tensor) -> Tensor:
        """Which LLM ids `[…]` are visual tokens, `<boi>` or `<eoi>`, bool `[…]`."""
        return (ids >= self.boi) & (ids <= self.eoi)


def extend_vocabulary(model: Any, tokenizer: Any, num_visual: int) -> VisualTokens:
    """Add `<boi>`, `num_visual` visual tokens and `<eoi>` to tokenizer and model, in place.

    Their rows (and rows between the old matrix and them, if there are any) are set to the mean row of the pretrained
    ones; all other rows stay as they are, bit for bit.

    Args:
        model: a decoder-only `AutoModelForCausalLM`.
        tokenizer: its tokenizer.

    Raises:
        V2FlowError: fewer than one visual token, or a tokenizer that has one of the tokens already.
    """
    if num_visual < 1:
        raise V2FlowError(f"num_visual: expected at least 1 visual token, found {num_visual}")
    names = [BOI, *map(visual_token, range(num_visual)), EOI]
    vocabulary = tokenizer.get_vocab()
    taken = next((name for name in names if name in vocabulary), None)
    if taken is not None:
        raise V2FlowError(
            f"LLM tokenizer: expected no token {taken!r}, found it with id {vocabulary[taken]}; "
            "start from the LLM as it was before its vocabulary was extended"
        )
    # Special tokens: only those are kept out of captions by split_special_tokens.
    tokenizer.add_tokens([AddedToken(n, special=True, normalized=False) for n in names], special_tokens=True)
    tokens = find_visual_tokens(tokenizer)
    known = model.get_input_embeddings().weight.shape[0]
    if tokens.eoi >= known:
        model.resize_token_embeddings(tokens.eoi + 1, mean_resizing=False)
    _fill_with_mean(model, tokens, known)
    return tokens


def find_visual_tokens(tokenizer: Any) -> VisualTokens:
    """The visual tokens of a tokenizer that was extended, for example of an exported model.

    Raises:
        V2FlowError: it was not, or their ids are not contiguous.
    """
    vocabulary = tokenizer.get_vocab()
    count = 0
    while visual_token(count) in vocabulary:
        count += 1
    names = [BOI, *map(visual_token, range(count)), EOI]
    ids = [vocabulary.get(name, -1) for name in names]
    if not count or ids != list(range(ids[0], ids[0] + len(ids))):
        raise V2FlowError(
            f"LLM tokenizer: expected {BOI}, {visual_token(0)}, …, {EOI} with ids in a row, found "
            f"{count} visual tokens and ids {ids[:2]}…{ids[-1:]}; extend its vocabulary with extend_vocabulary"
        )
    return VisualTokens(boi=ids[0], first=ids[1], eoi=ids[-1], num_visual=count)


@torch.no_grad()
def _fill_with_mean(model: Any, tokens: VisualTokens, known: int) -> None:
    """Set the new rows of table and head, and the biases of their columns, to the mean of the pretrained ones."""
    head = model.get_output_embeddings()
    parameters = {
        id(p): p for p in (model.get_input_embeddings().weight, head.weight, head.bias) if p is not None
    }
    for parameter in parameters.values():
        mean = parameter[: min(known, tokens.boi)].mean(0)
        parameter[tokens.rows] = mean
        parameter[known : tokens.boi] = mean


def encode_captions(tokenizer: Any, captions: Sequence[str], max_length: int) -> list[list[int]]:
    """LLM ids of captions, each with the tokenizer's beginning-of-sequence token if it sets one.

    A caption is text whatever it says: "<v_3>" or "<eos>" in it become ordinary tokens.

    Args:
        max_length: most ids that a caption may have, the beginning-of-sequence token included.

    Raises:
        V2FlowError: an empty caption, one that is not Unicode text, or one longer than `max_length`.
    """
    for index, caption in enumerate(captions):
        if not caption.strip():
            raise V2FlowError(f"caption {index}: expected some words, found {caption!r}")
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            # Half of a surrogate pair in JSON, or bytes of a command that are not UTF-8.
            raise V2FlowError(
                f"caption {index}: expected text, found {caption[:40]!r} ({error.reason})"
            ) from error
    if not captions:
        return []
    bos = tokenizer.bos_token_id
    prefix = [bos] if bos is not None and bos in tokenizer("").input_ids else []
    texts = tokenizer(
        list(captions), add_special_tokens=False, split_special_tokens=True, verbose=False
    ).input_ids
    encoded = [prefix + list(ids) for ids in texts]
    for index, ids in enumerate(encoded):
        if len(ids) > max_length:
            raise V2FlowError(
                f"caption {index} ({captions[index][:40]!r}…): expected at most {max_length} tokens, found {len(ids)}; "
                "shorten it or raise the maximum"
            )
    return encoded


def is_tied(model: Any) -> bool:
    """Whether the head's rows are the embedding table itself."""
    head: nn.Module = model.get_output_embeddings()
    return head.weight is model.get_input_embeddings().weight
