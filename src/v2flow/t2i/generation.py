"""Visual tokens of captions, drawn one after another from the LLM.

After `<boi>` only the visual columns of the head are computed, so an image holds exactly N visual tokens and `<eoi>`
is implied: the LLM's text columns, most of its head, cost nothing. Keys and values are cached.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from v2flow.arrays import NextIds, NextLogits, PerPicture, VisualIds
from v2flow.errors import V2FlowError
from v2flow.t2i.sequences import Sequences, join
from v2flow.t2i.visual_rows import hidden_states
from v2flow.tokenizer import inference

if TYPE_CHECKING:
    from v2flow.t2i.text_to_image import V2FlowForTextToImage


@dataclass
class GenerationOptions:
    """How to draw visual tokens. Guidance acts first, then temperature, then top-k, then top-p."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int | None = None
    """Only the k most probable tokens; None = all."""
    top_p: float | None = None
    """Only the fewest most probable tokens whose probabilities reach this sum, in (0, 1]; None = all."""
    guidance: float = 1.0
    """Classifier-free guidance scale, away from the logits without a caption; 1 = none. It needs an LLM trained with
    caption dropout, and doubles the cost."""

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "a number >= 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or none"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1, or none"),
            ("guidance", 0 <= self.guidance < float("inf"), "a number >= 0"),
        ):
            if not fits:
                raise V2FlowError(f"option {name}: expected {expected}, found {getattr(self, name)}")


def generation_options(options: Mapping[str, Any]) -> GenerationOptions:
    """`GenerationOptions` from keyword arguments.

    Raises:
        V2FlowError: an unknown name or a value out of range.
    """
    known = [f.name for f in fields(GenerationOptions)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise V2FlowError(
            f"generation option {unknown[0]!r}: unknown; expected one of {', '.join(known)} "
            "(options of the decoder go into decode=dict(…))"
        )
    return GenerationOptions(**options)


@torch.no_grad()
def generate_ids(
    model: "V2FlowForTextToImage",
    captions: Sequence[str],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    batch_size: int = 16,
    generator: torch.Generator | None = None,
) -> VisualIds:
    """Visual token ids `[B, N]` long in [0, K) of captions, on the device of the LLM; any number of captions.

    The draws are made in advance, N for each caption in turn: up to rounding, and with a generator on the CPU, the
    ids of a caption depend neither on `batch_size` nor on the captions after it. The other options are the fields of
    `GenerationOptions`.

    Args:
        batch_size: captions at a time.
        generator: source of the draws; seed it to repeat them.

    Raises:
        V2FlowError: an empty or too long caption, or an option out of range.
    """
    options = GenerationOptions(temperature, top_k, top_p, guidance)
    if batch_size < 1:
        raise V2FlowError(f"option batch_size: expected at least 1, found {batch_size}")
    encoded = model.caption_ids(captions)
    place = generator.device if generator is not None else torch.device("cpu")
    draws = torch.rand(len(encoded), model.num_tokens, generator=generator, device=place, dtype=torch.float64)
    if not encoded:
        return torch.empty(0, model.num_tokens, dtype=torch.long, device=model.device)
    device = model.device.type
    with inference(model), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        batches = [
            _continue(model, encoded[start : start + batch_size], part.to(model.device), options)
            for start, part in zip(range(0, len(encoded), batch_size), draws.split(batch_size), strict=True)
        ]
    return torch.cat(batches)


def draw(logits: NextLogits, uniform: PerPicture, options: GenerationOptions) -> NextIds:
    """Indices `[B]` drawn from logits `[B, K]` by uniform numbers `[B]` in [0, 1).

    Inverting the distribution function needs one number a draw, whatever top-k and top-p leave.
    """
    if options.temperature == 0:
        return logits.argmax(-1)
    ordered, order = (logits.double() / options.temperature).sort(dim=-1, descending=True, stable=True)
    if options.top_k is not None:
        ordered = ordered[:, : options.top_k]
    probabilities = ordered.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    if options.top_p is not None:
        # A token stays if those before it do not reach the sum, so the first always does.
        probabilities = probabilities.masked_fill(cumulative - probabilities >= options.top_p, 0.0)
        cumulative = probabilities.cumsum(-1)
    # Strictly inside the last value, so that no draw falls behind the last token that is left.
    target = uniform[:, None] * cumulative[:, -1:]
    index = (cumulative <= target).sum(-1, keepdim=True)
    last = ((probabilities > 0).sum(-1, keepdim=True) - 1).clamp_min(0)  # of no number nothing is above 0
    return order.gather(-1, index.minimum(last)).squeeze(-1)


def _continue(
    model: "V2FlowForTextToImage", captions: Sequence[Sequence[int]], draws: Tensor, options: GenerationOptions
) -> Tensor:  # fmt: skip
    """Visual token ids `[B, N]` after the LLM ids of captions, given uniform numbers `[B, N]`."""
    guided = options.guidance != 1.0
    rows = [*captions, *model.caption_ids([None] * len(captions))] if guided else captions
    steps = _Steps(model, join(rows, model.tokens))
    drawn: list[Tensor] = []
    for position in range(model.num_tokens):
        if drawn:
            steps.append(drawn[-1].repeat(2) if guided else drawn[-1])
        logits = steps.logits()
        if guided:
            conditional, base = logits.chunk(2)
            logits = base + options.guidance * (conditional - base)
        drawn.append(draw(logits, draws[:, position], options))
    return torch.stack(drawn, dim=1)


class _Steps:
    """Sequences under way: their cached keys and values, and the last hidden state of each, `[B, D]`."""

    def __init__(self, model: "V2FlowForTextToImage", prompt: Sequences) -> None:
        self.model = model
        device = model.device
        self.length = prompt.ids.shape[1]
        later = prompt.mask.new_ones(len(prompt.ids), model.num_tokens)
        # The whole mask at once; a step takes its beginning. Without padding none is needed.
        self.mask = (
            None if bool(prompt.mask.all()) else torch.cat([prompt.mask, later], dim=1).long().to(device)
        )
        self.positions = prompt.positions.to(device)
        self.cache = {cache_argument(model.llm): DynamicCache(config=model.llm.config)}
        self._run(prompt.ids.to(device))

    def logits(self) -> Tensor:
        """Logits `[B, K]` of the next visual token."""
        return self.model.rows.visual_logits(self.model.llm, self.hidden)[:, 1:-1]

    def append(self, ids: Tensor) -> None:
        """Continue the sequences by visual token ids `[B]` in [0, K)."""
        self.positions = self.positions[:, -1:] + 1
        self.length += 1
        self._run(ids[:, None] + self.model.tokens.first)

    def _run(self, ids: Tensor) -> None:
        embeddings = self.model.rows.embed(self.model.llm, ids)
        self.hidden = hidden_states(
            self.model.llm,
            embeddings,
            attention_mask=None if self.mask is None else self.mask[:, : self.length],
            position_ids=self.positions,
            use_cache=True,
            **self.cache,
        )[:, -1]


def cache_argument(llm: Any) -> str:
    """What the LLM's body calls its cache of keys and values: transformers renamed it in the fifth series."""
    names = inspect.signature(llm.get_decoder().forward).parameters
    return "cache" if "cache" in names else "past_key_values"
