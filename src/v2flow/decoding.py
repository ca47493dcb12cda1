"""From visual tokens to latents: AR iterations over positions, an ODE solve in each (paper section 3.3)."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from v2flow.arrays import PositionLatents, PositionMask, TokenEmbeddings
from v2flow.errors import V2FlowError
from v2flow.flow import FlowHead, gather_positions
from v2flow.masked_decoder import MaskedAutoregressiveDecoder, Prefix, cosine_schedule
from v2flow.samplers import SOLVERS, Solver, Velocity, solve, timesteps


@dataclass
class DecodeOptions:
    """How to draw latents from tokens. One step from t=1 is close to the conditional mean (best PSNR); more steps
    trade fidelity for realism."""

    steps: int = 1
    """ODE steps in each AR iteration."""
    iterations: int = 1
    """AR iterations; positions are revealed by a cosine schedule."""
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 = none."""
    guidance_schedule: Literal["constant", "linear"] = "constant"
    """linear: the scale rises from 1 at the start to `guidance` in the last AR iteration."""
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Lowest and highest t at which guidance acts (Kynkäänniemi et al. 2024); elsewhere the scale is 1, and the field
    is not evaluated without its condition."""
    solver: Solver = "euler"
    """ODE solver."""
    timestep_shift: float = 1.0
    """Above 1, more of the steps are spent near noise."""
    temperature: float = 1.0
    """Standard deviation of the starting noise."""

    def __post_init__(self) -> None:
        for number in ("guidance", "timestep_shift", "temperature"):
            if not abs(getattr(self, number)) < math.inf:  # isfinite fails on integers that no float holds
                raise V2FlowError(f"option {number}: expected a finite number, found {getattr(self, number)}")
        timesteps(self.steps, self.timestep_shift)
        if self.iterations < 1:
            raise V2FlowError(f"option iterations: expected at least 1, found {self.iterations}")
        if self.temperature < 0:
            raise V2FlowError(f"option temperature: expected a number >= 0, found {self.temperature}")
        interval = self.guidance_interval
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise V2FlowError(
                f"option guidance_interval: expected two times, 0 <= low <= high <= 1, found {interval}"
            )
        for name, value, allowed in (
            ("guidance_schedule", self.guidance_schedule, ("constant", "linear")),
            ("solver", self.solver, tuple(SOLVERS)),
        ):
            if value not in allowed:
                raise V2FlowError(f"option {name}: expected one of {', '.join(allowed)}, found {value!r}")

    def times(self) -> list[float]:
        """The `steps + 1` times of each ODE solve, from 1 to 0."""
        return timesteps(self.steps, self.timestep_shift)

    def guides_at(self, t: float) -> bool:
        """Whether guidance acts at time t."""
        low, high = self.guidance_interval
        return self.guidance != 1.0 and low - 1e-9 <= t <= high + 1e-9

    def guides(self) -> bool:
        """Whether guidance acts at any time at which the field is evaluated."""
        return any(self.guides_at(t) for t in self.times()[:-1])

    def guidance_at(self, iteration: int, iterations: int) -> float:
        """Scale in the AR iteration `iteration` of `iterations`, counted from 0."""
        if self.guidance_schedule == "constant":
            return self.guidance
        return 1.0 + (self.guidance - 1.0) * (iteration + 1) / iterations


def decode_options(options: dict[str, Any]) -> DecodeOptions:
    """`DecodeOptions` from keyword arguments.

    Raises:
        V2FlowError: an unknown name or a value out of range.
    """
    known = [f.name for f in fields(DecodeOptions)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise V2FlowError(f"decode option {unknown[0]!r}: unknown; expected one of {', '.join(known)}")
    return DecodeOptions(**options)


@dataclass
class DecodeMoment:
    """Decoding at one evaluation of the velocity field; its tensors are the decoder's own: read, do not write.

    Attributes:
        iteration: AR iteration, from 0.
        t: time of the ODE, from 1 (noise) towards 0.
        latents: `[B, L, C]`: drawn in earlier iterations, estimated where this one draws (x_t − t·v), else zero.
        mask: `[B, L]` bool, True at the positions of later iterations.
    """

    iteration: int
    t: float
    latents: PositionLatents
    mask: PositionMask


Watch = Callable[[DecodeMoment], None]
_WATCH: ContextVar[Watch | None] = ContextVar("v2flow_watch_decoding", default=None)


@contextmanager
def watch_decoding(watch: Watch) -> Iterator[None]:
    """Inside, whatever decodes in this thread calls `watch` at each evaluation of the velocity field."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


def draw_latents(
    decoder: MaskedAutoregressiveDecoder,
    head: FlowHead,
    tokens: TokenEmbeddings,
    positions: int,
    channels: int,
    options: DecodeOptions,
    generator: torch.Generator | None = None,
) -> PositionLatents:
    """Latents `[B, L, C]` for quantised visual tokens `[B, N, D]`.

    All randomness (order of positions, noise) is drawn first, so it does not depend on the number of steps.
    """
    batch, device = len(tokens), tokens.device
    draw = generator.device if generator is not None else device
    order = torch.rand(batch, positions, generator=generator, device=draw).to(device).argsort(dim=1)
    noise = torch.randn(batch, positions, channels, generator=generator, device=draw).to(device)
    noise = noise * options.temperature
    latents = torch.zeros_like(noise)
    mask = torch.ones(batch, positions, dtype=torch.bool, device=device)
    prefix = _read_tokens(decoder, head, tokens, options)
    left = positions
    iterations = min(options.iterations, positions)
    for k, remaining in enumerate(cosine_schedule(iterations, positions)):
        chosen, guidance = order[:, remaining:left], options.guidance_at(k, iterations)
        condition = _conditions(decoder, head, prefix, latents, mask, options)
        seen = _watcher(k, latents, mask, chosen)
        drawn = _draw_positions(head, condition, latents, mask, chosen, noise, options, guidance, seen)
        latents = latents.scatter(1, chosen[..., None].expand_as(drawn), drawn)
        mask = mask.scatter(1, chosen, False)
        left = remaining
    return latents


def _watcher(
    iteration: int, latents: Tensor, mask: Tensor, chosen: Tensor
) -> Callable[[Tensor, float], None] | None:
    """Tells the watch, if there is one, of the latents `[B, M, C]` estimated at the `chosen` positions at time t."""
    watch = _WATCH.get()
    if watch is None:
        return None

    def seen(estimate: Tensor, t: float) -> None:
        filled = latents.scatter(1, chosen[..., None].expand_as(estimate), estimate)
        watch(DecodeMoment(iteration, t, filled, mask.scatter(1, chosen, False)))

    return seen


def _read_tokens(
    decoder: MaskedAutoregressiveDecoder, head: FlowHead, tokens: Tensor, options: DecodeOptions
) -> Prefix:
    """The tokens, read once for all iterations; where the transformer guides, followed by as many null rows."""
    if not options.guides() or head.config.target == "residual":
        return decoder.read_tokens(tokens)
    null = torch.arange(2 * len(tokens), device=tokens.device) >= len(tokens)
    return decoder.read_tokens(torch.cat([tokens, tokens]), null)


def _conditions(
    decoder: MaskedAutoregressiveDecoder, head: FlowHead, prefix: Prefix, latents: Tensor, mask: Tensor,
    options: DecodeOptions,
) -> Tensor:  # fmt: skip
    """Conditions `[B, L, W]`; with guidance `[2B, L, W]`, the second half without the tokens (of a residual's field,
    without anything)."""
    if not options.guides():
        return decoder.conditions(prefix, latents, mask).float()
    if head.config.target == "residual":
        condition = decoder.conditions(prefix, latents, mask).float()
        return torch.cat([condition, head.unconditional(condition)])
    return decoder.conditions(prefix, _twice(latents), _twice(mask)).float()


def _draw_positions(
    head: FlowHead, condition: Tensor, latents: Tensor, mask: Tensor, chosen: Tensor, noise: Tensor,
    options: DecodeOptions, guidance: float, seen: Callable[[Tensor, float], None] | None,
) -> Tensor:  # fmt: skip
    """Latents `[B, M, C]` at the `chosen [B, M]` positions, given those that `mask` leaves visible."""
    batch, clean = len(latents), None
    if head.field.joint:
        known, start = ~mask, noise
        if not mask.all():
            # A joint field sees the known positions' clean values, in the units of the flow.
            clean = head.normalise(latents, condition[:batch])
    else:
        places = chosen if len(condition) == batch else _twice(chosen)
        condition = gather_positions(condition, places)
        known, start = torch.zeros_like(chosen, dtype=torch.bool), gather_positions(noise, chosen)
    velocity = _velocity(head, condition, known, clean, options, guidance)

    def latents_of(x: Tensor) -> Tensor:
        drawn = head.to_latents(x, condition[:batch])
        return gather_positions(drawn, chosen) if head.field.joint else drawn

    def watched(x: Tensor, t: float) -> Tensor:
        v = velocity(x, t)
        if seen is not None:
            seen(latents_of(x - t * v.float()), t)
        return v

    return latents_of(solve(watched, start, options.times(), options.solver))


def _velocity(
    head: FlowHead, condition: Tensor, known: Tensor, clean: Tensor | None, options: DecodeOptions, guidance: float
) -> Velocity:  # fmt: skip
    """The velocity under `condition`; where there are `clean` values, the known positions have those.

    With a second half of conditions, classifier-free guidance: away from the velocity under those, both halves in one
    pass, at the times at which it acts.
    """
    batch = len(known)

    def velocity(x: Tensor, t: float) -> Tensor:
        if clean is not None:
            x = torch.where(known[..., None], clean, x)
        time = torch.full((1, 1), t, device=x.device)
        if not options.guides_at(t):
            return head.velocity(x, time, condition[:batch], known)
        conditional, base = head.velocity(_twice(x), time, condition, _twice(known)).chunk(2)
        return base + guidance * (conditional - base)

    return velocity


def _twice(x: Tensor) -> Tensor:
    """Rows `[B, …]` followed by themselves."""
    return torch.cat([x, x])
