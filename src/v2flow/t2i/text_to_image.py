"""V2FlowForTextToImage: a frozen V2Flow tokenizer and an LLM that speaks its visual tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from v2flow.arrays import PerPicture, Pictures, VisualIds
from v2flow.decoding import decode_options
from v2flow.errors import V2FlowError
from v2flow.t2i.extension import VisualTokens
from v2flow.t2i.generation import generate_ids, generation_options
from v2flow.t2i.hub import PretrainedTextToImage
from v2flow.t2i.image_loss import ImageLoss, image_log_likelihood, image_loss
from v2flow.t2i.sequences import caption_ids, join
from v2flow.t2i.text_loss import HELD_OUT, caption_loss, text_perplexity
from v2flow.t2i.visual_rows import VisualRows
from v2flow.tokenizer import V2FlowTokenizer, check_ids, inference

MEAN = {"steps": 1, "temperature": 0.0}
"""How ids become pictures unless the user says otherwise: the conditional mean, as for an exported tokenizer."""


class V2FlowForTextToImage(nn.Module, PretrainedTextToImage):
    """Captions to pictures by next-token prediction (paper section 3.4).

    Args:
        tokenizer: trained; it is frozen.
        llm: a causal LLM whose vocabulary was extended, see `extend_vocabulary`.
        llm_tokenizer: its tokenizer.
        tokens: where its visual tokens are.
        rows: their rows; those of `llm` when left out.
        max_caption: most LLM ids of a caption, the beginning-of-sequence token included.

    Raises:
        V2FlowError: a tokenizer with another number of codes than there are visual tokens, or captions and pictures
            that do not fit into the LLM's context.
    """

    def __init__(
        self,
        tokenizer: V2FlowTokenizer,
        llm: Any,
        llm_tokenizer: Any,
        tokens: VisualTokens,
        rows: VisualRows | None = None,
        max_caption: int = 64,
    ) -> None:
        super().__init__()
        if tokenizer.codebook_size != tokens.num_visual:
            raise V2FlowError(
                f"tokenizer: expected {tokens.num_visual} codes, as many as the LLM has visual tokens, found "
                f"{tokenizer.codebook_size}; extend the LLM for this tokenizer"
            )
        context = getattr(llm.config, "max_position_embeddings", None)
        needed = max_caption + tokenizer.num_tokens + 2
        if context is not None and needed > context:
            raise V2FlowError(
                f"option max_caption: {max_caption} caption ids and {tokenizer.num_tokens} visual tokens need a "
                f"context of {needed}, found an LLM with {context}; lower max_caption or use fewer tokens a picture"
            )
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.llm: Any = llm
        self.llm_tokenizer = llm_tokenizer
        self.tokens = tokens
        self.rows = rows if rows is not None else VisualRows(llm, tokens)
        self.max_caption = max_caption

    @property
    def num_tokens(self) -> int:
        """Visual tokens a picture, N."""
        return self.tokenizer.num_tokens

    @property
    def device(self) -> torch.device:
        """Where the LLM is."""
        return self.rows.input.device

    def caption_ids(self, captions: Sequence[str | None]) -> list[list[int]]:
        """LLM ids of captions; None stands for no caption."""
        return caption_ids(self.llm_tokenizer, captions, self.max_caption)

    def loss(
        self, captions: Sequence[str | None], ids: VisualIds, full_share: float = 0.125, text_weight: float = 0.0,
        generator: torch.Generator | None = None, full_weight: float = 1.0, sampled_words: int = 0,
    ) -> ImageLoss:  # fmt: skip
        """Training loss of captions and the visual token ids `[B, N]` of their pictures; see `image_loss`.

        Args:
            text_weight: of the captions' own loss in the total; 0 leaves it out.
        """
        check_ids(ids, self.num_tokens, self.tokens.num_visual)
        batch = join(self.caption_ids(captions), self.tokens, ids.to(self.device))
        found = image_loss(
            self.llm, self.rows, batch, self.num_tokens, full_share, generator, full_weight, sampled_words
        )
        if not text_weight:
            return found
        text = caption_loss(self.llm, self.rows, batch, self.num_tokens, found.hidden)
        return replace(found, total=found.total + text_weight * text, text=text)

    def text_perplexity(self, texts: Sequence[str] = HELD_OUT) -> float:
        """Perplexity of texts over the whole vocabulary, visual tokens included, in evaluation mode."""
        with inference(self):
            return text_perplexity(self.llm, self.rows, self.llm_tokenizer, texts)

    def log_likelihood(self, captions: Sequence[str | None], ids: VisualIds) -> PerPicture:
        """Log-likelihood `[B]` in nats of the pictures' ids `[B, N]` given their captions."""
        check_ids(ids, self.num_tokens, self.tokens.num_visual)
        batch = join(self.caption_ids(captions), self.tokens, ids.to(self.device))
        return image_log_likelihood(self.llm, self.rows, batch, self.num_tokens)

    @torch.no_grad()
    def generate(
        self, captions: Sequence[str], *, decode: Mapping[str, Any] | None = None, batch_size: int = 16,
        generator: torch.Generator | None = None, **options: Any,
    ) -> Pictures:  # fmt: skip
        """Pictures `[B, 3, H, W]` in [0, 1], on the CPU, of any number of captions.

        Args:
            decode: fields of `DecodeOptions` for turning ids into pictures; by default one step without noise.
            batch_size: captions at a time. The ids do not depend on it; the decoder's noise, where there is any, does.
            generator: source of every draw; seed it to repeat the pictures.
            options: fields of `GenerationOptions`: temperature, top_k, top_p and guidance of the ids.

        Raises:
            V2FlowError: an empty or too long caption, or an option that is unknown or out of range.
        """
        drawn = asdict(generation_options(options))
        settings = asdict(
            decode_options(dict(MEAN if decode is None else decode))
        )  # refused before the LLM runs
        ids = generate_ids(self, captions, batch_size=batch_size, generator=generator, **drawn)
        return torch.cat(
            [self.tokenizer.decode(part, generator, **settings).cpu() for part in ids.split(batch_size)]
        )
