"""Visual tokens by their words: what each means in one LLM's vocabulary, said again in another's embeddings.

The resampler makes every visual token a distribution over words, so the tokenizer is not bound to the LLM whose
vocabulary it was trained on: words are matched by their strings, and the expected embedding is taken in the new table.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import decoders
from torch import Tensor

from v2flow.errors import V2FlowError
from v2flow.tokenizer import V2FlowTokenizer

_BYTES = decoders.ByteLevel()
_BYTE = re.compile(r"^<0x([0-9A-F]{2})>$")


@dataclass
class TokenWords:
    """What the visual tokens mean.

    Attributes:
        probabilities: each token's mean distribution over the vocabulary's words, `[K, V]`, rows sum to 1. A token
            that no picture used has that of the used token whose code is most similar.
        counts: how often each token was used, `[K]`.
        words: the V strings.
    """

    probabilities: Tensor
    counts: Tensor
    words: list[str]

    @property
    def unused(self) -> int:
        """Number of tokens that no picture used."""
        return int((self.counts == 0).sum())


@dataclass
class WordDirections:
    """Visual tokens in the embeddings of an LLM.

    Attributes:
        directions: expected embedding of each token, centred on the mean of the matched words, `[K, D]`.
        mass: share of each token's distribution on words that the LLM has, `[K]` in [0, 1].
        matched: number of words that it has.
    """

    directions: Tensor
    mass: Tensor
    matched: int


def words_batch(tokenizer: V2FlowTokenizer) -> int:
    """Pictures that `token_words` reads at once, at most 32: each token has an id, a probability, a double of it and a
    place for every word, 32 bytes, which are to stay below half a GB."""
    return max(min((1 << 29) // (32 * tokenizer.num_tokens * len(tokenizer.words)), 32), 1)


@torch.no_grad()
def token_words(
    tokenizer: V2FlowTokenizer, loader: Iterable[dict[str, Any]], pictures: int | None = None
) -> TokenWords:
    """Mean word distribution of every visual token over pictures.

    Args:
        tokenizer: on the device that it is to run on.
        loader: batches with `image` `[B, 3, H, W]` in [0, 1] and, in padded ones, `valid` `[B]`.
        pictures: stop after about this many; by default all.

    Raises:
        V2FlowError: a tokenizer without a vocabulary, or no pictures.
    """
    words = len(tokenizer.words)
    if tokenizer.config.resampler.readout == "none":
        raise V2FlowError(
            "option rows: words need a tokenizer with word distributions, found one with resampler.readout=none; "
            "use rows=projection"
        )
    codes = tokenizer.visual_vocabulary.codes
    sums = torch.zeros(tokenizer.codebook_size * words, dtype=torch.float64, device=codes.device)
    counts = torch.zeros(tokenizer.codebook_size, dtype=torch.long, device=codes.device)
    seen = 0
    for batch in loader:
        images = batch["image"].to(codes.device)
        images = images[batch["valid"].to(codes.device)] if "valid" in batch else images
        soft = tokenizer.encode(images, return_soft=True, top_words=words)
        places = soft.ids[..., None] * words + soft.words
        sums.index_add_(0, places.flatten(), soft.probabilities.flatten().double())
        counts += torch.bincount(soft.ids.flatten(), minlength=len(counts))
        seen += len(images)
        if pictures is not None and seen >= pictures:
            break
    if not seen:
        raise V2FlowError("option rows: words need pictures to read the visual tokens from, found none")
    means = sums.view(len(counts), words) / counts.clamp_min(1)[:, None]
    used = counts.nonzero().squeeze(1)
    nearest = used[(codes @ codes[used].T).argmax(1)]
    nearest[used] = used
    means = means[nearest]
    return TokenWords((means / means.sum(1, keepdim=True)).float(), counts, list(tokenizer.words))


def word_directions(source: TokenWords, llm_tokenizer: Any, table: Tensor) -> WordDirections:
    """The tokens' expected embeddings in an LLM's table `[V', D]`, by the strings of its words.

    Mass on words that it does not have counts for nothing.

    Raises:
        V2FlowError: it has none of the words.
    """
    ids = matching_ids(source.words, llm_tokenizer, len(table))
    there = (ids >= 0).nonzero().squeeze(1)
    if not len(there):
        raise V2FlowError(
            f"option rows: words: none of the tokenizer's {len(source.words)} words is in the LLM's vocabulary; use "
            "rows=projection"
        )
    rows = table.detach()[ids[there].to(table.device)].float()
    probabilities = source.probabilities[:, there.to(source.probabilities.device)].to(rows.device)
    return WordDirections(probabilities @ (rows - rows.mean(0)), probabilities.sum(1), len(there))


def matching_ids(words: Sequence[str], llm_tokenizer: Any, rows: int) -> Tensor:
    """Ids below `rows` in the LLM's vocabulary of the strings that `words` stand for, `[V]` long; -1 for none.

    Special tokens match nothing.
    """
    special = set(llm_tokenizer.all_special_ids) | {
        index for index, token in llm_tokenizer.added_tokens_decoder.items() if token.special
    }
    entries = sorted((i, word) for word, i in llm_tokenizer.get_vocab().items() if i < rows)
    texts = surface_forms([word for _, word in entries])
    found: dict[str, int] = {}
    for (index, _), text in zip(entries, texts, strict=True):
        if text and index not in special:
            found.setdefault(text, index)
    return torch.tensor([found.get(text, -1) if text else -1 for text in surface_forms(words)])


def surface_forms(words: Sequence[str]) -> list[str | None]:
    """The text that each entry of a vocabulary stands for; None for parts of a character.

    Vocabularies with Ġ for a space are byte-level (GPT-2, Qwen, LLaMA 3), the others have ▁ (Gemma, LLaMA 2).
    """
    byte_level = sum(word.startswith("Ġ") for word in words) > sum(word.startswith("▁") for word in words)
    return [_byte_level_form(word) if byte_level else _piece_form(word) for word in words]


def _byte_level_form(word: str) -> str | None:
    text: str = _BYTES.decode([word])
    return None if "\ufffd" in text else text


def _piece_form(word: str) -> str | None:
    byte = _BYTE.match(word)
    if byte is None:
        return word.replace("▁", " ")
    value = int(byte[1], 16)
    return chr(value) if value < 128 else None
