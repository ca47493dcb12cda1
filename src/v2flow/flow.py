"""Rectified flow given a condition: path, loss and velocity.

One convention everywhere: x_t = (1-t)·x_0 + t·ε, velocity v = ε − x_0, t=1 is noise (paper section 3.3, rectified
flow). Three targets:

- ``residual``: a linear head gives the conditional mean m of the latent; the flow models r = (x_0 − m)/σ with σ the
  running rms of the residual. The network output F is preconditioned to unit variance at every t:
  r̂ = (1−t)/s²·r_t + t/s·F with s² = (1−t)² + t², hence v = (2t−1)/s²·r_t − F/s and F's target is (t·r − (1−t)·ε)/s.
- ``x0``: the output (plus a linear image of the condition) is x̂_0; its error is weighed by min(1/t², cap).
- ``velocity``: the output is v of the latent itself, with the plain velocity loss (the reference).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from v2flow.arrays import (
    ChosenPositions,
    ChosenRows,
    Conditions,
    DrawnTimesteps,
    PictureFlags,
    PositionLatents,
    PositionMask,
    Scalar,
    Timesteps,
)
from v2flow.config import VelocityConfig
from v2flow.fine_grid import FineMean
from v2flow.velocity import build_field


@dataclass
class FlowLoss:
    """Loss terms in latent units.

    Attributes:
        mean: squared error of the conditional mean (zero where the target has none).
        flow: loss of the velocity field.
        total: what to minimise.
    """

    mean: Scalar
    flow: Scalar
    total: Scalar


def draw_timesteps(
    shape: tuple[int, ...], config: VelocityConfig, generator: torch.Generator | None, device: torch.device
) -> DrawnTimesteps:
    """Timesteps in (0, 1]: a share exactly at 1, the rest logit-normal."""
    normal = torch.randn(shape, generator=generator, device=device)
    t = torch.sigmoid(config.logit_mean + config.logit_std * normal)
    start = torch.rand(shape, generator=generator, device=device) < config.start_share
    return torch.where(start, torch.ones_like(t), t)


def gather_positions(x: PositionLatents, index: ChosenPositions) -> ChosenRows:
    """Rows `[B, M, C]` of `x [B, L, C]` at `index [B, M]`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _build_mean(
    channels: int, condition_dim: int, grid: tuple[int, int], config: VelocityConfig
) -> nn.Module | None:
    """Conditions to conditional means of latents, where the target has one."""
    if config.mean_depth:
        return FineMean(
            channels, condition_dim, grid, config.fine_patch, config.fine_width, config.mean_depth
        )
    if config.target == "residual" or (config.target == "x0" and config.skip):
        return nn.Linear(condition_dim, channels)
    return None


class FlowHead(nn.Module):
    """Conditions to distributions of latents.

    Args:
        channels: channels C of a latent position.
        condition_dim: width W of the conditions.
        grid: rows and columns of latent positions.
    """

    residual_std: Tensor
    residual_batches: Tensor

    def __init__(
        self, channels: int, condition_dim: int, grid: tuple[int, int], config: VelocityConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.field = build_field(channels, condition_dim, grid, config)
        self.mean = _build_mean(channels, condition_dim, grid, config)
        if config.target == "residual":
            self.null_condition = nn.Parameter(torch.randn(condition_dim) * 0.02)
        self.register_buffer("residual_std", torch.ones(channels))
        self.register_buffer("residual_batches", torch.zeros(()))

    def loss(
        self, latents: PositionLatents, condition: Conditions, mask: PositionMask,
        generator: torch.Generator | None = None, progress: float = 1.0, null: PictureFlags | None = None,
        masked: int | None = None,
    ) -> FlowLoss:  # fmt: skip
        """Loss on the masked positions of `latents [B, L, C]` given `condition [B, L, W]`, `mask [B, L]`.

        Args:
            null: `[B]` bool, true where the field is to learn without its condition; only for target=residual, where
                the conditional mean keeps it (the other targets have their null in the decoder).
            progress: share of the training done. Where the field is to learn alone, its loss is zero until then
                and the only one with a gradient afterwards.
            masked: true entries of a row of the mask, where they are known; to count them is to wait for the device.
        """
        stage = self.config.stage(progress)
        if not self.field.joint:
            # One ratio a batch: every row has the same number of masked positions, gathered before the field.
            count = int(mask[0].sum()) if masked is None else masked
            index = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
            latents, condition = gather_positions(latents, index), gather_positions(condition, index)
            mask = mask.gather(1, index)
        weight = mask[..., None].float() / (mask.sum() * latents.shape[-1])
        zero = latents.new_zeros(())
        target, mean_loss = latents, zero
        if self.config.target == "residual":
            assert self.mean is not None
            with torch.set_grad_enabled(torch.is_grad_enabled() and stage != "field"):
                mean = self.mean(condition).float()
            mean_loss = ((latents - mean).square() * weight).sum()
            target = self._normalised_residual(latents - mean.detach(), weight)
        if null is not None and stage != "tokens":
            condition = torch.where(null[:, None, None], self.unconditional(condition), condition)
        flow = zero
        for _ in range(0 if stage == "tokens" else self.config.draws):
            error = self._draw_error(target, condition, mask, generator)
            flow = flow + (error * weight).sum() / self.config.draws
        return FlowLoss(mean_loss, flow, mean_loss + self.config.weight * flow)

    def _normalised_residual(self, residual: Tensor, weight: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            variance = (residual.square() * weight).sum((0, 1)) * residual.shape[-1]
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(variance)
                variance = variance / dist.get_world_size()
            # A plain mean over the first batches, then a running one.
            self.residual_batches += 1
            rate = self.residual_batches.reciprocal().clamp_min(0.02)
            self.residual_std.copy_(self.residual_std.square().lerp(variance, rate).sqrt().clamp_min(1e-6))
        return residual / self.residual_std

    def _draw_error(
        self, target: Tensor, condition: Tensor, mask: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Weighted squared error `[B, M, C]` of one noise draw a position."""
        b, m, _ = target.shape
        device = target.device
        t = draw_timesteps((b, 1) if self.field.joint else (b, m), self.config, generator, device).expand(
            b, m
        )
        noise = torch.randn(target.shape, generator=generator, device=device)
        u = t[..., None]
        x = torch.where(mask[..., None], (1 - u) * target + u * noise, target)
        output = self.field(x, t, condition, ~mask).float()
        if self.config.target == "velocity":
            return (output - (noise - target)).square()
        if self.config.target == "x0":
            error = (self._skip(condition) + output - target).square()
            return error * u.square().reciprocal().clamp_max(self.config.weight_cap)
        s = ((1 - u).square() + u.square()).sqrt()
        # In latent units, so that what reaches the tokens weighs as the error of the mean does.
        return self.residual_std.square() * (output - (u * target - (1 - u) * noise) / s).square()

    def _skip(self, condition: Tensor) -> Tensor | float:
        return 0.0 if self.mean is None else self.mean(condition).float()

    def velocity(
        self, x: PositionLatents, t: Timesteps, condition: Conditions, known: PositionMask
    ) -> PositionLatents:
        """Velocity `[B, M, C]` at `x [B, M, C]`, `t [B, M]` or one for all `[1, 1]`, in the units of `normalise`."""
        output = self.field(x, t, condition, known).float()
        u = t[..., None]
        if self.config.target == "velocity":
            return output
        if self.config.target == "x0":
            return (x - self._skip(condition) - output) / u.clamp_min(1e-3)
        s2 = (1 - u).square() + u.square()
        return (2 * u - 1) / s2 * x - output / s2.sqrt()

    def unconditional(self, condition: Conditions) -> Conditions:
        """The condition of a field that is told nothing, in the shape of `condition [B, M, W]`; target=residual."""
        return self.null_condition.to(condition.dtype).expand_as(condition)

    def normalise(self, latents: PositionLatents, condition: Conditions) -> PositionLatents:
        """Latents in the units of the flow."""
        if self.config.target != "residual":
            return latents
        assert self.mean is not None
        return (latents - self.mean(condition).float()) / self.residual_std

    def to_latents(self, x: PositionLatents, condition: Conditions) -> PositionLatents:
        """The inverse of `normalise`."""
        if self.config.target != "residual":
            return x
        assert self.mean is not None
        return self.mean(condition).float() + self.residual_std * x
