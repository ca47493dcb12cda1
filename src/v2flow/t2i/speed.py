"""How fast visual tokens are generated, against `generate` of transformers on the same model.

All ways run in one process, interleaved, and ratios are taken within a round, so that what else the machine does
falls on both sides. Greedy decoding: every way must give the same ids, or the comparison is refused.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from v2flow.benchmark.overhead import Spread
from v2flow.errors import V2FlowError
from v2flow.t2i.extension import VisualTokens
from v2flow.t2i.generation import generate_ids
from v2flow.t2i.hub import merged_llm
from v2flow.t2i.sequences import join

if TYPE_CHECKING:
    from v2flow.t2i.text_to_image import V2FlowForTextToImage

OURS, CACHED, UNCACHED = "v2flow", "transformers", "transformers-uncached"


class VisualTokensOnly(LogitsProcessor):
    """Leaves only `<v_0>` … `<v_{K-1}>` to draw from."""

    def __init__(self, tokens: VisualTokens) -> None:
        self.first, self.end = tokens.first, tokens.eoi

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[B, V]` with all others at minus infinity."""
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self.first : self.end] = scores[:, self.first : self.end]
        return allowed


def plain_generate(
    model: "V2FlowForTextToImage", llm: Any, captions: Sequence[str], use_cache: bool = True
) -> Tensor:
    """Visual token ids `[B, N]`, most probable ones, by `generate` of a plain merged LLM."""
    prompt = join(model.caption_ids(captions), model.tokens)
    config = GenerationConfig(
        max_new_tokens=model.num_tokens, do_sample=False, use_cache=use_cache, pad_token_id=0
    )
    ids = llm.generate(
        prompt.ids.to(model.device), attention_mask=prompt.mask.long().to(model.device), generation_config=config,
        logits_processor=LogitsProcessorList([VisualTokensOnly(model.tokens)]),
    )  # fmt: skip
    return ids[:, prompt.ids.shape[1] :] - model.tokens.first


def generation_speed(
    model: "V2FlowForTextToImage", captions: Sequence[str], *, rounds: int = 3, uncached: bool = True
) -> dict[str, Any]:
    """Pictures a second (their ids, without decoding) of one batch of captions.

    Args:
        rounds: measurements of each way, after one that is thrown away.
        uncached: also measure `generate` without cached keys and values.

    Returns:
        `captions`, `tokens`, `threads`, `rounds`; `images_per_second`: way -> spread (`median`, `low`, `high`);
        `speed_ratio`: other way -> spread of v2flow's speed over its, above 1 is faster.

    Raises:
        V2FlowError: two ways gave different ids.
    """
    llm = merged_llm(model)
    ways: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: generate_ids(model, captions, temperature=0.0, batch_size=len(captions)),
        CACHED: lambda: plain_generate(model, llm, captions),
    }
    if uncached:
        ways[UNCACHED] = lambda: plain_generate(model, llm, captions, use_cache=False)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        found = {}
        for name in ways if number % 2 else reversed(ways):
            start = time.perf_counter()
            found[name] = ways[name]().cpu()  # waits for the device
            if number:
                seconds[name].append(time.perf_counter() - start)
        _check_equal(found)
    return {
        "captions": len(captions),
        "tokens": model.num_tokens,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "images_per_second": {
            name: asdict(Spread.of([len(captions) / s for s in times])) for name, times in seconds.items()
        },
        "speed_ratio": {
            name: asdict(Spread.of([s / ours for s, ours in zip(times, seconds[OURS], strict=True)]))
            for name, times in seconds.items()
            if name != OURS
        },
    }


def _check_equal(found: dict[str, Tensor]) -> None:
    for name, ids in found.items():
        if not torch.equal(ids, found[OURS]):
            share = (ids != found[OURS]).float().mean().item()
            raise V2FlowError(
                f"generation speed: expected the same ids of {OURS} and {name}, found {share:.1%} of them different; "
                "compare in fp32"
            )
