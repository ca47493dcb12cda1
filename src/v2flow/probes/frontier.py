"""What decoding costs and what it is worth: the reference's way done literally, Pareto frontiers and presets."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from v2flow.decode_modes import PRESETS
from v2flow.flow import FlowHead
from v2flow.masked_decoder import MaskedAutoregressiveDecoder
from v2flow.tokenizer import V2FlowTokenizer

KID = "kid-efficientnet-lite0"
LITERAL: dict[str, Any] = {
    "steps": 20, "iterations": 4, "solver": "multistep", "timestep_shift": 3.0, "guidance": 2.9,
    "guidance_schedule": "linear",
}  # fmt: skip
"""The reference's settings: 4 AR iterations of 20 second-order steps, with guidance."""
TUNING: dict[str, list[float]] = {"guidance": [1.0, 1.5, 2.9], "steps": [5, 10, 20]}
"""Options of the literal way that are tuned, one after the other."""
STRONGER: dict[str, list[float]] = {"temperature": [0.8, 1.0]}
"""What the reference does not vary, tuned after those: a harder row to be compared with."""

Figures = Mapping[str, float]
"""Figures of one setting: psnr, `KID` with its `_se`, seconds (a picture), …"""


def literal(model: V2FlowTokenizer) -> V2FlowTokenizer:
    """The same tokenizer, decoded as the reference does it: in every AR iteration the tokens are read again, and every
    position computes its own timestep and modulation at every step. Its pictures are the same but for rounding."""
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.decoder, other.head = _LiteralDecoder(model.decoder), _LiteralHead(model.head)  # type: ignore[assignment]
    return other


class _LiteralDecoder(nn.Module):
    """Keeps nothing of the tokens from one AR iteration to the next."""

    def __init__(self, decoder: MaskedAutoregressiveDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def read_tokens(self, tokens: Tensor, null: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return tokens, null

    def conditions(self, prefix: tuple[Tensor, Tensor | None], latents: Tensor, mask: Tensor) -> Tensor:
        tokens, null = prefix
        condition: Tensor = self.decoder(tokens, latents, mask, null)
        return condition


class _LiteralHead(nn.Module):
    """Gives every position a time of its own."""

    def __init__(self, head: FlowHead) -> None:
        super().__init__()
        self.head, self.field, self.config, self.residual_std = (
            head,
            head.field,
            head.config,
            head.residual_std,
        )
        self.normalise, self.to_latents, self.unconditional = (
            head.normalise,
            head.to_latents,
            head.unconditional,
        )

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor, known: Tensor) -> Tensor:
        return self.head.velocity(x, t.expand(x.shape[:2]).clone(), condition, known)


def tune(
    measure: Callable[[dict[str, Any]], Figures],
    start: Mapping[str, Any],
    choices: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Options from `start` on, each of `choices` in turn set to the cheapest value whose KID is within one standard
    error of that of the best value."""
    options = dict(start)
    for name, values in choices.items():
        tried = [options | {name: value} for value in values]
        rows = {str(i): measure(each) for i, each in enumerate(tried)}
        options = tried[int(within(rows, 0.0, errors=1.0))]
    return options


def within(rows: Mapping[str, Figures], loss: float, errors: float = 0.0) -> str:
    """The cheapest row whose KID is above the lowest one by no more than this share of it, or than so many of its
    standard errors."""
    best = min(rows.values(), key=lambda row: row[KID])
    allowed = best[KID] + max(loss * abs(best[KID]), errors * best[f"{KID}_se"])
    return min((n for n, row in rows.items() if row[KID] <= allowed), key=lambda n: rows[n]["seconds"])


def pareto(rows: Mapping[str, Figures]) -> list[str]:
    """The rows that no other is both faster and closer to the pictures than, from the fastest on."""
    kept: list[str] = []
    for name in sorted(rows, key=lambda n: (rows[n]["seconds"], rows[n][KID])):
        if not kept or rows[name][KID] < rows[kept[-1]][KID]:
            kept.append(name)
    return kept


def thinned(names: Sequence[str], most: int) -> list[str]:
    """At most so many of the names, the first and the last among them and the others evenly between."""
    if len(names) <= most:
        return list(names)
    return [names[round(i * (len(names) - 1) / max(most - 1, 1))] for i in range(most)]


def pick_presets(rows: Mapping[str, Figures], fast_loss: float, balanced_loss: float) -> dict[str, str]:
    """Preset -> row: best has the lowest KID; fast and balanced are the cheapest within these losses of it."""
    return dict(zip(PRESETS, (within(rows, loss) for loss in (fast_loss, balanced_loss, 0.0)), strict=True))


def equal_in_quality(rows: Mapping[str, Figures], reference: Figures, psnr_loss: float = 0.1) -> str | None:
    """The fastest row whose KID is within the reference's standard error or better, and whose psnr is at most so many
    dB below; None if there is none."""
    allowed = reference[KID] + reference[f"{KID}_se"]
    equal = [
        name
        for name, row in rows.items()
        if row[KID] <= allowed and row["psnr"] >= reference["psnr"] - psnr_loss
    ]
    return min(equal, key=lambda name: rows[name]["seconds"], default=None)


def decode_batch(model: V2FlowTokenizer, ids: Tensor, options: Mapping[str, Any], seed: int) -> Tensor:
    """Pictures of ids `[B, N]`, with noise of the seed."""
    return model.decode(ids, torch.Generator().manual_seed(seed), **options)
