"""What evaluation asks of the training shards: the marginal of their ids, and the pictures nearest to others."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from v2flow.data.shard_names import Shards
from v2flow.data.shards import ShardSet, open_shards
from v2flow.t2i.metrics.marginal import marginal_ids
from v2flow.t2i.metrics.picture_distance import nearest_training_pictures
from v2flow.t2i.metrics.samples import (
    encoded_batches,
    holds_scenes,
    holds_tokens,
    picture_batches,
    token_batches,
)


@dataclass(frozen=True)
class TrainingSet:
    """Training shards: token shards, or captioned pictures.

    Attributes:
        shards: opened.
        tokenizer: the V2Flow tokenizer of the model.
        num_workers: processes that read.
    """

    shards: ShardSet
    tokenizer: Any
    num_workers: int = 0

    @property
    def has_pictures(self) -> bool:
        """Whether there are pictures, or scenes that tell how they look."""
        return not holds_tokens(self.shards) or holds_scenes(self.shards)

    def marginal(self) -> Tensor:
        """How often each id stands at each position, long `[N, K]`; pictures are encoded for it."""
        count = len(self.shards)
        batches = encoded_batches(
            self.shards, self.tokenizer, count, num_workers=self.num_workers, pictures=False
        )
        return marginal_ids(batches, self.tokenizer.codebook_size)

    def nearest(self, pictures: Tensor) -> tuple[Tensor, float]:
        """See `nearest_training_pictures`."""
        read = token_batches if holds_tokens(self.shards) else picture_batches
        size, count = self.tokenizer.config.image_size, len(self.shards)
        batches = read(self.shards, size, count, num_workers=self.num_workers)
        return nearest_training_pictures(batches, pictures)


def open_training_set(
    data: Shards, tokenizer: Any, num_workers: int = 0, allow_pipe: bool = False
) -> TrainingSet:
    """The training set of shards.

    Raises:
        V2FlowError: they cannot be read.
    """
    return TrainingSet(open_shards(data, allow_pipe), tokenizer, num_workers)
