"""Velocity fields: networks that see noisy latents, their timestep and a condition.

Per position (the paper's, after MAR's AdaLN MLP) or joint over all positions of a picture. Both map
`x [B, M, C]`, `t [B, M]`, `condition [B, M, W]`, `known [B, M]` to an output `[B, M, C]`; what the output
means (velocity, x_0 or a preconditioned residual) is decided in flow.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from v2flow.config import VelocityConfig
from v2flow.errors import V2FlowError
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
        shift, scale, gate = self.modulation(control).chunk(3, dim=-1)
        return x + gate * self.mlp(_modulate(self.norm(x), shift, scale))


class PerPositionField(nn.Module):
    """AdaLN MLP on each position alone (paper section 3.3; MAR's denoising MLP)."""

    joint = False

    def __init__(self, channels: int, condition_dim: int, config: VelocityConfig) -> None:
        super().__init__()
        width = config.width
        self.inputs = nn.Linear(channels, width)
        self.time = TimestepEmbedding(width)
        self.condition = nn.Linear(condition_dim, width)
        self.blocks = nn.ModuleList(AdaLNBlock(width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, channels)
        _initialise(self)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, known: Tensor) -> Tensor:
        control = F.silu(self.time(t) + self.condition(condition))
        h = self.inputs(x)
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
        a, b, c, d, e, f = self.modulation(control).chunk(6, dim=-1)
        x = x + c * self.attention(_modulate(self.norm1(x), a, b))
        return x + f * self.mlp(_modulate(self.norm2(x), d, e))


class FineBlock(nn.Module):
    """Residual 3×3 convolutions on the fine grid, modulated by the picture's timestep."""

    def __init__(self, width: int, control: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, width), nn.GroupNorm(4, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Linear(control, 2 * width)
        _zero(self.modulation)
        _zero(self.conv2)

    def forward(self, x: Tensor, control: Tensor) -> Tensor:
        shift, scale = self.modulation(control).transpose(1, 2)[..., None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(_modulate(self.norm2(h), shift, scale)))


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
        p2, fine = config.fine_patch**2, config.fine_width
        if channels % p2:
            raise V2FlowError(
                f"option velocity.fine_patch: expected a number whose square divides the codec's {channels} channels, "
                f"found {config.fine_patch}; use 1 for latents that are not patches"
            )
        self.fine_stem = nn.Conv2d(channels // p2, fine, 3, padding=1)
        self.fine_condition = nn.Linear(condition_dim, p2 * fine)
        self.fine_before = nn.ModuleList(FineBlock(fine, config.width) for _ in range(config.fine_depth))
        self.fine_after = nn.ModuleList(FineBlock(fine, config.width) for _ in range(config.fine_depth))
        self.inputs = nn.Linear(p2 * fine, config.width)
        self.output = nn.Linear(config.width, p2 * fine)
        self.fine_output = nn.Sequential(
            nn.GroupNorm(4, fine), nn.SiLU(), nn.Conv2d(fine, channels // p2, 3, padding=1)
        )
        _zero(self.output)
        _zero(self.fine_output[-1])

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, known: Tensor) -> Tensor:
        control = F.silu(self.time(t[:, :1]))
        fine = None
        if self.fine_patch > 1:
            fine = self.fine_stem(self._to_fine(x)) + self._to_fine(self.fine_condition(condition))
            for fine_block in self.fine_before:
                fine = fine_block(fine, control)
            x = self._from_fine(fine)
        h = self.inputs(x) + self.condition(condition) + self.positions + known[..., None] * self.known
        for block in self.blocks:
            h = block(h, control)
        shift, scale = self.modulation(control).chunk(2, dim=-1)
        h = self.output(_modulate(self.norm(h), shift, scale))
        if fine is None:
            return h
        fine = fine + self._to_fine(h)
        for fine_block in self.fine_after:
            fine = fine_block(fine, control)
        return self._from_fine(self.fine_output(fine))

    def _to_fine(self, x: Tensor) -> Tensor:
        """`[B, L, c·p²]` to the fine grid `[B, c, h·p, w·p]`."""
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, self.grid), self.fine_patch)

    def _from_fine(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, self.fine_patch).flatten(2).transpose(1, 2)


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
        _zero(part)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
