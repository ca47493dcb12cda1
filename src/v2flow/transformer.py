"""Transformer blocks shared by the masked decoder, the joint velocity field and the baselines."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """Multi-head self-attention over all positions of `[B, N, D]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Sequential):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__(nn.Linear(width, ratio * width), nn.GELU("tanh"), nn.Linear(ratio * width, width))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """`depth` blocks and a final norm, `[B, N, D]` to `[B, N, D]`."""

    def __init__(self, width: int, depth: int, heads: int, checkpointing: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)


def grid_positions(rows: int, columns: int, width: int) -> Tensor:
    """Two-dimensional sine-cosine positions `[rows*columns, width]` over the unit square.

    Coordinates are cell centres in [0, 1], so grids of different sizes over one picture agree: a visual token
    and the latents under it start with similar positions.
    """
    if width % 4:
        raise ValueError(f"width must be a multiple of 4 for two-dimensional positions, found {width}")
    y = (torch.arange(rows) + 0.5) / rows
    x = (torch.arange(columns) + 0.5) / columns
    # The device is named: loading an LLM under the meta device can leave torch.linspace out of torch's device contexts.
    frequencies = 2 * torch.pi * 2 ** torch.linspace(-1, 4, width // 4, device=y.device)
    parts = []
    for coordinate in torch.meshgrid(y, x, indexing="ij"):
        angles = coordinate.reshape(-1, 1) * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1)


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer below `module`."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
