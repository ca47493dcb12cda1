"""Transformer blocks shared by the masked decoder, the joint velocity field and the baselines."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one attention layer, each `[B, heads, N, D / heads]`."""


class Attention(nn.Module):
    """Multi-head self-attention over all positions of `[B, N, D]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] to [B, N, width]; every position attends to all."""
        return self.extend(x)[0]

    def extend(self, x: Tensor, prefix: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        """Every position of x `[B, N, D]` attends to the prefix before it and to all of x; and the keys and values of
        both."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if prefix is not None:
            k, v = torch.cat([prefix[0], k], dim=2), torch.cat([prefix[1], v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        return self.out(out), (k, v)


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
        """[B, N, width] to [B, N, width]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def extend(self, x: Tensor, prefix: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        """x `[B, N, width]` after a prefix, see `Attention.extend`."""
        attended, keys_values = self.attention.extend(self.norm1(x), prefix)
        x = x + attended
        return x + self.mlp(self.norm2(x)), keys_values


class Transformer(nn.Module):
    """`depth` blocks and a final norm, `[B, N, D]` to `[B, N, D]`."""

    def __init__(self, width: int, depth: int, heads: int, checkpointing: bool = False) -> None:
        super().__init__()
        self.blocks: Iterable[Block] = nn.ModuleList(Block(width, heads) for _ in range(depth))  # type: ignore[assignment]
        self.norm = nn.LayerNorm(width)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] to [B, N, width], normalised at the end."""
        for block in self.blocks:
            x = self._run(block, x)
        return self.norm(x)

    def read_prefix(self, x: Tensor) -> tuple[Tensor, list[KeysValues]]:
        """States of a prefix `[B, P, D]` that attends only to itself, and its keys and values in every block."""
        kept = []
        for block in self.blocks:
            x, keys_values = self._run(block.extend, x)
            kept.append(keys_values)
        return self.norm(x), kept

    def after_prefix(self, x: Tensor, prefix: list[KeysValues]) -> Tensor:
        """States of x `[B, N, D]` that attends to itself and to a prefix, as `read_prefix` left it."""
        for block, keys_values in zip(self.blocks, prefix, strict=True):
            x, _ = self._run(block.extend, x, keys_values)
        return self.norm(x)

    def _run(self, block: Callable[..., Any], *inputs: Any) -> Any:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


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
