"""Velocity fields: networks that see noisy latents, their timestep and a condition.

Per position (the paper's, after MAR's AdaLN MLP) or joint over all positions of a picture. Both map
`x [B, M, C]`, `t [B, M]`, `condition [B, M, W]`, `known [B, M]` to an output `[B, M, C]`; a time that all positions
share may be given as `t [1, 1]`, and what depends on it alone is then computed once. What the output
means (velocity, x_0 or a preconditioned residual) is decided in flow.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from v2flow.arrays import Conditions, PositionLatents, PositionMask, Timesteps
from v2flow.config import VelocityConfig
from v2flow.fine_grid import FineBlock, FineOutput, check_fine, from_fine, to_fine, zero
from v2flow.transformer import Attention, Mlp, grid_positions, init_linear


class TimestepEmbedding(nn.Module):
    """Sinusoidal features of t in [0, 1] and a two-layer MLP; the features are computed in fp32."""

    frequencies: Tensor

    def __init__(self, width: int, features: int = 128) -> None:
        super().__init__()
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(features // 2) / (features // 2))
        self.register_buffer("frequencies", 1000.0 * frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Times t of any shape [...] in [0, 1] to vectors [..., width]."""
        angles = t.float()[..., None] * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class AdaLNBlock(nn.Module):
    """MLP block whose norm and gate are set by the timestep and the condition of each position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = Mlp(width, ratio=1)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, control: Tensor) -> Tensor:
        """[..., width] to the same, shifted, scaled and gated by `control`."""
        shift, scale, gate = self.modulation(control).chunk(3, dim=-1)
        return x + gate * self.mlp(_modulate(self.norm(x), shift, scale))


class PerPositionField(nn.Module):
    """AdaLN MLP on each position alone (paper section 3.3; MAR's denoising MLP).

    With `modulation=timestep` the condition is added at the input, as in `JointField`; otherwise, as in the paper, to
    the timestep's vector.
    """

    joint = False

    def __init__(self, channels: int, condition_dim: int, config: VelocityConfig) -> None:
        super().__init__()
        width = config.width
        self.by_timestep = config.modulation == "timestep"
        self.inputs = nn.Linear(channels, width)
        self.time = TimestepEmbedding(width)
        self.condition = nn.Linear(condition_dim, width)
        self.blocks = nn.ModuleList(AdaLNBlock(width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, channels)
        _initialise(self)

    def forward(
        self, x: PositionLatents, t: Timesteps, condition: Conditions, known: PositionMask
    ) -> PositionLatents:
        """Noisy latents x [M, N, C] at times t [M, N] under conditions [M, N, D]; `known` is not used."""
        h, control, condition = self.inputs(x), self.time(t), self.condition(condition)
        if self.by_timestep:
            h = h + condition
        else:
            control = control + condition
        control = F.silu(control)
        for block in self.blocks:
            h = block(h, control)
        shift, scale = self.modulation(control).chunk(2, dim=-1)
        return self.output(_modulate(self.norm(h), shift, scale))


class JointBlock(nn.Module):
    """Attention and MLP over all positions, modulated by the picture's timestep alone."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = Mlp(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, control: Tensor) -> Tensor:
        """[M, N, width] to the same; `control` [M, 1, width] is one for all positions."""
        a, b, c, d, e, f = self.modulation(control).chunk(6, dim=-1)
        x = x + c * self.attention(_modulate(self.norm1(x), a, b))
        return x + f * self.mlp(_modulate(self.norm2(x), d, e))


class JointField(nn.Module):
    """A transformer over all positions: neighbouring patches agree on their noise.

    One timestep a picture. Known positions bring their clean values (t=0) and are marked as such; the condition
    is added at the input, so the modulation depends on the timestep alone and costs one row a picture.

    With `fine_patch` p > 1 the channels of a position are read as p×p finer positions (the pixels of a patch, in
    the order of `torch.nn.functional.pixel_unshuffle`): convolutions on that grid before and after the transformer
    see edges across patch borders, which a linear map of each patch does not.
    """

    joint = True

    def __init__(
        self, channels: int, condition_dim: int, grid: tuple[int, int], config: VelocityConfig
    ) -> None:
        super().__init__()
        width = config.width
        self.grid, self.fine_patch = grid, config.fine_patch
        self.inputs = nn.Linear(channels, width)
        self.condition = nn.Linear(condition_dim, width)
        self.known = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(grid_positions(*grid, width))
        self.time = TimestepEmbedding(width)
        self.blocks = nn.ModuleList(JointBlock(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, channels)
        _initialise(self)
        if config.fine_patch > 1:
            self._build_fine(channels, condition_dim, config)

    def _build_fine(self, channels: int, condition_dim: int, config: VelocityConfig) -> None:
        check_fine(channels, config.fine_patch)
        p2, fine = config.fine_patch**2, config.fine_width
        self.fine_stem = nn.Conv2d(channels // p2, fine, 3, padding=1)
        self.fine_condition = nn.Linear(condition_dim, p2 * fine)
        self.fine_before = nn.ModuleList(FineBlock(fine, config.width) for _ in range(config.fine_depth))
        self.fine_after = nn.ModuleList(FineBlock(fine, config.width) for _ in range(config.fine_depth))
        self.inputs = nn.Linear(p2 * fine, config.width)
        self.output = nn.Linear(config.width, p2 * fine)
        self.fine_output = FineOutput(fine, channels // p2)
        zero(self.output)

    def forward(
        self, x: PositionLatents, t: Timesteps, condition: Conditions, known: PositionMask
    ) -> PositionLatents:
        """Noisy latents x [M, N, C] at times t [M, N], one a picture, under conditions [M, N, D];
        `known` [M, N] marks latents that are given.
        """
        control = F.silu(self.time(t[:, :1]))
        fine = None
        if self.fine_patch > 1:
            local = to_fine(self.fine_condition(condition), self.grid, self.fine_patch)
            fine = self.fine_stem(to_fine(x, self.grid, self.fine_patch)) + local
            for fine_block in self.fine_before:
                fine = fine_block(fine, control)
            x = from_fine(fine, self.fine_patch)
        h = self.inputs(x) + self.condition(condition) + self.positions + known[..., None] * self.known
        for block in self.blocks:
            h = block(h, control)
        shift, scale = self.modulation(control).chunk(2, dim=-1)
        h = self.output(_modulate(self.norm(h), shift, scale))
        if fine is None:
            return h
        fine = fine + to_fine(h, self.grid, self.fine_patch)
        for fine_block in self.fine_after:
            fine = fine_block(fine, control)
        return from_fine(self.fine_output(fine), self.fine_patch)


def build_field(
    channels: int, condition_dim: int, grid: tuple[int, int], config: VelocityConfig
) -> PerPositionField | JointField:
    """The velocity field that the configuration names."""
    if config.kind == "joint":
        return JointField(channels, condition_dim, grid, config)
    return PerPositionField(channels, condition_dim, config)


def _initialise(field: PerPositionField | JointField) -> None:
    """Zero modulations make each block the identity at first; a zero output predicts the mean."""
    init_linear(field)
    for part in [
        *(block.get_submodule("modulation") for block in field.blocks),
        field.modulation,
        field.output,
    ]:
        zero(part)
