"""A small real tokenizer, its Lightning module and a loader, for the tests of metrics."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from v2flow.ranks import world

MODES: dict[str, dict[str, Any]] = {"mean": {"spread": 0.0}, "sampled": {"spread": 0.1}}


class ColourTokenizer(nn.Module):
    """One token for each 4 x 4 patch: its mean colour in 4 levels a channel, K = 64. `decode` adds `spread` noise."""

    codebook_size = 64

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def encode(self, images: Tensor) -> Tensor:
        levels = nn.functional.avg_pool2d(images, 4).clamp(0, 0.999).mul(4).long()
        return (levels[:, 0] * 16 + levels[:, 1] * 4 + levels[:, 2]).flatten(1)

    def decode(self, ids: Tensor, generator: torch.Generator | None = None, spread: float = 0.0) -> Tensor:
        assert not self.training
        side = int(ids.shape[1] ** 0.5)
        levels = torch.stack([ids // 16, ids // 4 % 4, ids % 4], dim=1).unflatten(2, (side, side))
        images = (levels + 0.5) / 4 * self.gain
        images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
        return images + spread * torch.randn(images.shape, generator=generator)


class PlainTokenizer(ColourTokenizer):
    """The same without randomness in `decode`, like a plain autoencoder."""

    def decode(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().decode(ids)


class ToyModule(LightningModule):
    """Every step moves `gain` by 0.1, so that raw and averaged weights differ."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ColourTokenizer()
        self.decode_modes = MODES

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return -0.1 * self.model.gain

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class ToyLoader:
    """`count` smooth random pictures of 16 px in batches; the last batch and the ranks are evened out with
    padding.

    Batch b of rank r holds the samples from (b · ranks + r) · batch_size on, as the data module's do.
    """

    def __init__(self, count: int, batch_size: int) -> None:
        coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(5))
        self.images = nn.functional.interpolate(coarse, size=16, mode="bilinear")
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.images) // (self.batch_size * world()[1]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rank, ranks = world()
        for batch in range(len(self)):
            first = (batch * ranks + rank) * self.batch_size
            indices = torch.arange(first, first + self.batch_size)
            valid = indices < len(self.images)
            yield {
                "image": self.images[indices.clamp(max=len(self.images) - 1)],
                "key": [f"{index:04d}" for index in indices.tolist()],
                "caption": [""] * self.batch_size,
                "valid": valid,
            }
