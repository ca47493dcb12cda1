"""One text-to-image model under measurement: its training steps on its own token shards, and pictures of captions."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from v2flow.benchmark.subject import TrainingSubject, seconds_of
from v2flow.data.batches import Request
from v2flow.data.loaders import TrainLoader
from v2flow.errors import V2FlowError
from v2flow.training.module import seeded_generator
from v2flow.training.t2i_module import TextToImageModule
from v2flow.training.token_data_module import TokenDataModule


class TextToImageSubject(TrainingSubject):
    """A module, not a copy of it, on the first batches of its training shards; draw i is batch i of their order.

    Gradients and optimiser state are let go after each measurement, so that of many subjects only one has them.
    """

    module: TextToImageModule

    def __init__(self, module: TextToImageModule, data: TokenDataModule, device: torch.device) -> None:
        super().__init__(module, data.batch_size, device)
        loader = TrainLoader(data.train_batches(), data.batch_size)  # refuses too few samples
        self.batches, self.most = loader.batches, loader.total // loader.global_batch
        self._read: dict[int, tuple[list[str], Tensor]] = {}
        self.stages = module.config.step_kinds()

    def batch(self, draw: int) -> tuple[list[str], Tensor]:
        """Captions, and ids `[B, N]`; read once."""
        if draw not in self._read:
            found = self.batches[Request(0, draw % self.most * self.batch_size, self.batch_size)]
            if found.error is not None:
                raise V2FlowError(found.error)
            self._read[draw] = found.caption, found.tensors["ids"].to(self.device)
        return self._read[draw]

    def loss(self, stage: str, draw: int) -> Tensor:
        """The training loss on one batch of token shards; the draw decides batch and random numbers."""
        given, ids = self.batch(draw)
        generator = seeded_generator(self.device, draw)
        captions = self.module.drop_captions(given, generator)
        return self.module.losses(captions, ids, generator, self.module.config.step_of(stage))["loss"]

    def release(self) -> None:
        """Lets gradients and optimiser state go."""
        self.optimizer.zero_grad()
        self.optimizer.state.clear()

    def flops(self, stage: str, draw: int) -> int:
        """FLOPs of a step; gradients and optimiser state are released afterwards."""
        try:
            return super().flops(stage, draw)
        finally:
            self.release()

    def peak_memory(self, stage: str, draws: int) -> int:
        """Peak bytes of a step, the optimiser's state included; released afterwards."""
        try:
            self.step(stage, 0)  # makes the optimiser's state, which lies there from then on
            return super().peak_memory(stage, draws)
        finally:
            self.release()

    def generate(self, draw: int) -> Any:
        """Draws the ids of one batch of captions."""
        captions, _ = self.batch(draw)
        return self.model.generate(
            captions, batch_size=self.batch_size, generator=seeded_generator(torch.device("cpu"), draw)
        )

    def time(self, draw: int) -> dict[str, float]:
        """Seconds of a training step and of drawing one batch."""
        self.module.train()
        self.step(next(iter(self.stages)), draw)  # not timed: it makes the optimiser's state anew
        seconds = self.step_seconds(draw)
        self.release()
        return seconds | {"generate": seconds_of(partial(self.generate, draw), self.device)}
