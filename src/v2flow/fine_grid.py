"""Networks on the fine grid: each latent position read as p×p finer ones, such as the pixels of a patch.

A linear map of each patch cannot see an edge that crosses its border; convolutions on the fine grid can. The order
of the fine positions within the channels is that of `torch.nn.functional.pixel_unshuffle`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from v2flow.errors import V2FlowError


def to_fine(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """`[B, L, c·p²]` to the fine grid `[B, c, h·p, w·p]`."""
    return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, grid), patch)


def from_fine(x: Tensor, patch: int) -> Tensor:
    """The inverse of `to_fine`."""
    return F.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)


def check_fine(channels: int, patch: int) -> None:
    """Refuse latents whose channels are not p² finer positions each.

    Raises:
        V2FlowError: names the option and the number of channels.
    """
    if channels % patch**2:
        raise V2FlowError(
            f"option velocity.fine_patch: expected a number whose square divides the codec's {channels} channels, "
            f"found {patch}; use 1 for latents that are not patches"
        )


class FineBlock(nn.Module):
    """Two residual 3×3 convolutions; with `control` set, modulated by a vector a picture of that width."""

    def __init__(self, width: int, control: int | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, width), nn.GroupNorm(4, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Linear(control, 2 * width) if control is not None else None
        zero(self.conv2)
        if self.modulation is not None:
            zero(self.modulation)

    def forward(self, x: Tensor, control: Tensor | None = None) -> Tensor:
        """`[B, width, H, W]` and `control [B, 1, D]`, the vector of each picture."""
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.modulation is not None:
            shift, scale = self.modulation(control).transpose(1, 2)[..., None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


class FineOutput(nn.Sequential):
    """Norm, SiLU and a 3×3 convolution to the channels of a fine position; zero at first."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))
        zero(self[2])


class FineMean(nn.Module):
    """Conditional mean of all positions: a linear map of the conditions, corrected on the fine grid.

    Args:
        channels: channels C of a latent position.
        condition_dim: width W of the conditions.
        grid: rows and columns of latent positions.
        patch: p, the fine positions along a side of a latent position.
        width: channels of the convolutions.
        depth: residual blocks.
    """

    def __init__(
        self, channels: int, condition_dim: int, grid: tuple[int, int], patch: int, width: int, depth: int
    ) -> None:
        super().__init__()
        check_fine(channels, patch)
        self.grid, self.patch = grid, patch
        self.linear = nn.Linear(condition_dim, channels)
        self.inputs = nn.Linear(condition_dim, width * patch**2)
        self.blocks = nn.Sequential(*(FineBlock(width) for _ in range(depth)))
        self.output = FineOutput(width, channels // patch**2)

    def forward(self, condition: Tensor) -> Tensor:
        """Conditions `[B, L, W]` to means `[B, L, C]`."""
        fine = self.blocks(to_fine(self.inputs(condition), self.grid, self.patch))
        return self.linear(condition) + from_fine(self.output(fine), self.patch)


def zero(layer: nn.Module) -> None:
    """Set every parameter of `layer` to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
