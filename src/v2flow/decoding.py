"""From visual tokens to latents: AR iterations over positions, an ODE solve in each (paper section 3.3)."""

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from v2flow.errors import V2FlowError
from v2flow.flow import FlowHead, gather_positions
from v2flow.masked_decoder import MaskedAutoregressiveDecoder, cosine_schedule
from v2flow.samplers import Velocity, solve, timesteps


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
    solver: Literal["euler", "heun", "multistep"] = "euler"
    """ODE solver."""
    timestep_shift: float = 1.0
    """Above 1, more of the steps are spent near noise."""
    temperature: float = 1.0
    """Standard deviation of the starting noise."""

    def __post_init__(self) -> None:
        timesteps(self.steps, self.timestep_shift)
        if self.iterations < 1:
            raise V2FlowError(f"option iterations: expected at least 1, found {self.iterations}")
        if self.temperature < 0:
            raise V2FlowError(f"option temperature: expected a number >= 0, found {self.temperature}")
        for name, value, allowed in (
            ("guidance_schedule", self.guidance_schedule, ("constant", "linear")),
            ("solver", self.solver, ("euler", "heun", "multistep")),
        ):
            if value not in allowed:
                raise V2FlowError(f"option {name}: expected one of {', '.join(allowed)}, found {value!r}")

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


def draw_latents(
    decoder: MaskedAutoregressiveDecoder,
    head: FlowHead,
    tokens: Tensor,
    positions: int,
    channels: int,
    options: DecodeOptions,
    generator: torch.Generator | None = None,
) -> Tensor:
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
    left = positions
    iterations = min(options.iterations, positions)
    for k, remaining in enumerate(cosine_schedule(iterations, positions)):
        chosen, guidance = order[:, remaining:left], options.guidance_at(k, iterations)
        drawn = _draw_positions(decoder, head, tokens, latents, mask, chosen, noise, options, guidance)
        latents = latents.scatter(1, chosen[..., None].expand_as(drawn), drawn)
        mask = mask.scatter(1, chosen, False)
        left = remaining
    return latents


def _draw_positions(
    decoder: MaskedAutoregressiveDecoder, head: FlowHead, tokens: Tensor, latents: Tensor, mask: Tensor,
    chosen: Tensor, noise: Tensor, options: DecodeOptions, guidance: float,
) -> Tensor:  # fmt: skip
    """Latents `[B, M, C]` at the `chosen [B, M]` positions, given those that `mask` leaves visible."""
    condition = decoder(tokens, latents, mask).float()
    base = None if guidance == 1.0 else _unconditional(decoder, head, tokens, latents, mask, condition)
    if head.field.joint:
        known, start = ~mask, noise
    else:
        condition = gather_positions(condition, chosen)
        base = None if base is None else gather_positions(base, chosen)
        known, start = torch.zeros_like(chosen, dtype=torch.bool), gather_positions(noise, chosen)
    # A joint field sees the known positions' clean values, in the units of the flow.
    clean = head.normalise(latents, condition) if head.field.joint else None
    velocity = _velocity(head, condition, known, clean)
    if base is not None:
        velocity = _guided(velocity, _velocity(head, base, known, clean), guidance)
    x = solve(velocity, start, timesteps(options.steps, options.timestep_shift), options.solver)
    drawn = head.to_latents(x, condition)
    return gather_positions(drawn, chosen) if head.field.joint else drawn


def _unconditional(
    decoder: MaskedAutoregressiveDecoder, head: FlowHead, tokens: Tensor, latents: Tensor, mask: Tensor,
    condition: Tensor,
) -> Tensor:  # fmt: skip
    """Conditions `[B, L, W]` without the tokens; of a residual's field, without anything."""
    if head.config.target == "residual":
        return head.unconditional(condition)
    return decoder(
        tokens, latents, mask, torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    ).float()


def _guided(conditional: Velocity, base: Velocity, guidance: float) -> Velocity:
    """Classifier-free guidance: away from the velocity without the condition."""

    def velocity(x: Tensor, t: float) -> Tensor:
        v = base(x, t)
        return v + guidance * (conditional(x, t) - v)

    return velocity


def _velocity(head: FlowHead, condition: Tensor, known: Tensor, clean: Tensor | None) -> Velocity:
    """The velocity under one condition; where there are `clean` values, the known positions have those."""

    def velocity(x: Tensor, t: float) -> Tensor:
        if clean is not None:
            x = torch.where(known[..., None], clean, x)
        times = torch.full(x.shape[:2], t, device=x.device)
        return head.velocity(x, times, condition, known)

    return velocity
