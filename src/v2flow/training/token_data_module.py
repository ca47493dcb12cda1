"""The LightningDataModule of stage 2: shards of token ids in, batches of ids, captions and keys out."""

from typing import Optional, Union

import numpy as np

from v2flow.data.batches import TrainBatches
from v2flow.data.tokens import TokenReader, TokenSource, check_source
from v2flow.training.streaming import StreamingDataModule, at_least

CHECKED = 20_000
"""Captions of a split whose length is checked before a training, the longest first: a second or two."""


class TokenDataModule(StreamingDataModule):
    """Streams token ids and captions, in an order as reproducible as that of pictures; see `StreamingDataModule`.

    Batches are {"ids": long [B, N] in [0, K), "caption": list[str], "key": list[str]}; in evaluation also
    "valid": bool [B], False for padding.

    Args:
        train: training shards, made by `v2flow data tokens`; None if there is no training.
        val: validation shards; None for no validation. Never taken from the training shards.
        test: test shards; None if there is no test.
        batch_size: samples in a training batch of one rank; the last partial global batch of an epoch is dropped.
        eval_batch_size: samples in a validation or test batch of one rank; None for batch_size.
        num_workers: processes that read; 0 does it in the training process.
        seed: of the order.
        length_window: positions of the order that are sorted by the length of their captions, so that batches need
            little padding; a multiple of 8 global batches keeps every batch to one length. 0 for none.
        val_limit: only the first so many validation samples.
        test_limit: only the first so many test samples.
        allow_pipe: accept shards `pipe:COMMAND`, which run a shell command.
    """

    def __init__(
        self,
        train: Optional[Union[str, list[str]]] = None,
        val: Optional[Union[str, list[str]]] = None,
        test: Optional[Union[str, list[str]]] = None,
        batch_size: int = 8,
        eval_batch_size: Optional[int] = None,
        num_workers: int = 0,
        seed: int = 0,
        length_window: int = 0,
        val_limit: Optional[int] = None,
        test_limit: Optional[int] = None,
        allow_pipe: bool = False,
    ) -> None:
        super().__init__(
            train=train, val=val, test=test, batch_size=batch_size, eval_batch_size=eval_batch_size,
            num_workers=num_workers, seed=seed, captions=True, val_limit=val_limit, test_limit=test_limit,
            max_bad_samples=0, allow_pipe=allow_pipe,
        )  # fmt: skip
        at_least(0, length_window=length_window)
        self.length_window = length_window

    def reader(self, split: str) -> TokenReader:
        """Reads the ids of `train`, `val` or `test`."""
        return TokenReader(self.shards(split))

    def train_batches(self) -> TrainBatches:
        """The shuffled batches of the training shards."""
        return TrainBatches(
            self.reader("train"), self.seed, random_crop=False, flip=False, max_bad=0,
            length_window=self.length_window,
        )  # fmt: skip

    def check(self, split: str, source: TokenSource) -> None:
        """Refuse a split whose ids are another tokenizer's; see `check_source`."""
        check_source(self.shards(split), source)

    def long_captions(self, split: str, tokens: int, count: int = CHECKED) -> dict[str, str]:
        """Caption -> where it stands, of captions that may have more than `tokens` tokens.

        A token is at least a byte, so shorter ones cannot; nor can the number of bytes tell more: 'xyzqw 1234567' may
        be more tokens than a long sentence.

        Args:
            count: look at so many samples at most, the longest first; last those whose captions are in their json.
        """
        shards, reader = self.shards(split), self.reader(split)
        lengths = shards.caption_bytes()
        order = np.argsort(-lengths, kind="stable")
        order = order[(lengths[order] > tokens) | (lengths[order] == 0)][:count]
        found: dict[str, str] = {}
        for sample in order.tolist():
            found.setdefault(reader.caption(sample), shards.where(sample))
        return found
