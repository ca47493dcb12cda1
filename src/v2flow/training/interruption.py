"""Signals that end a training: it stops between two optimiser steps, with a checkpoint from which it goes on."""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment

from v2flow.training.resume import is_accumulating

_Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class TrainingInterrupted(SystemExit):
    """A training that a signal has stopped.

    The exit status is 128 plus the signal's number, as a shell gives it: 143 for SIGTERM, 130 for Ctrl-C. Ranks other
    than the first exit with 0, or Lightning's launcher would kill the first while it still saves.

    Attributes:
        message: what has stopped, what was saved and how to go on, on one line; empty on other ranks.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.message = ""


class InterruptionCallback(Callback):
    """On SIGTERM and Ctrl-C saves `last.ckpt` between two optimiser steps and stops the training.

    A validation is broken off, and begins anew at the resume. One rank that gets the signal is enough. The signal of
    SLURM's preemption is left to Lightning's own handler, which saves and requeues, but called between two steps.
    A second Ctrl-C stops at once, without a checkpoint.
    """

    def __init__(self) -> None:
        self._received = 0
        self._handlers: dict[int, _Handler] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals, after Lightning has set its own handlers."""
        self._received = 0
        wanted = {int(signal.SIGTERM), int(signal.SIGINT)} | _requeue_signals(trainer)
        # Lightning has set its handlers by now; they act in the middle of a step.
        self._handlers = {number: signal.signal(number, self._receive) for number in wanted}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == number:
            raise KeyboardInterrupt
        if not self._received and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            again = ", Ctrl-C again stops at once" if number == signal.SIGINT else ""
            text = (
                f"v2flow: {signal.Signals(number).name}: stopping after this step, with a checkpoint{again}\n"
            )
            os.write(2, text.encode())  # print may be what the signal interrupts
        self._received = self._received or number

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops here if a signal has come, but not amid gradient accumulation."""
        if not is_accumulating(trainer):
            self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops here if a signal has come."""
        self._stop_if_asked(trainer)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Stops here if a signal has come."""
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if not self._handlers:  # a sanity check, or no training
            return
        number = self._received
        if trainer.world_size > 1:
            received = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(received, reduce_op="max"))
        if number:
            raise TrainingInterrupted(number)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last one everything is saved: a signal may end the process while the result is scored."""
        steps, epochs = trainer.max_steps, trainer.max_epochs or -1
        over = (
            0 < steps <= trainer.global_step or 0 < epochs <= trainer.current_epoch + 1 or trainer.should_stop
        )
        if over and self._restore():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Lightning's handler would wait for the next batch

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the signals back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves a checkpoint, says how to go on, and gives the signals back."""
        try:
            if isinstance(exception, TrainingInterrupted):
                self._save(trainer, exception)
        finally:
            self._restore()  # not before: Lightning's handlers act amid what they interrupt, here the save

    def _save(self, trainer: Trainer, exception: TrainingInterrupted) -> None:
        name = signal.Signals(exception.number).name
        line = f"v2flow: stopped by {name} after step {trainer.global_step}"
        requeue = self._handlers.get(exception.number)
        if exception.number in _requeue_signals(trainer) and callable(requeue):
            requeue(exception.number, None)
            line += "; saved a checkpoint for SLURM, which runs the job again"
        else:
            path = save_last(trainer)
            line += f"; go on with --ckpt_path {path} or --ckpt_path last" if path else "; nothing is saved"
        if trainer.is_global_zero:
            exception.message = line
        else:
            exception.code = 0

    def _restore(self) -> dict[int, _Handler]:
        handlers, self._handlers = self._handlers, {}
        for number, handler in handlers.items():
            signal.signal(number, handler)
        return handlers


def _requeue_signals(trainer: Trainer) -> set[int]:
    """The signal at which Lightning saves and requeues a SLURM job, if it does."""
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return set()
    return {int(environment.requeue_signal)} if environment.requeue_signal is not None else set()


def last_checkpoint(trainer: Trainer) -> str | None:
    """Where the newest state of this run is saved; None if the run saves nothing."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return os.path.join(callback.dirpath, ModelCheckpoint.CHECKPOINT_NAME_LAST + ".ckpt")
    return None


def save_last(trainer: Trainer) -> str | None:
    """Save the newest state of this run; every rank must call it. Gives the file, None if the run saves nothing."""
    path = last_checkpoint(trainer)
    if path is not None:
        trainer.save_checkpoint(path, weights_only=False)  # the whole state; said, or Lightning remarks on it
    return path
