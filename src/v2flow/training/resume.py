"""What Lightning's checkpoints lack for a training to go on exactly from wherever one was saved.

Lightning saves how far it has come in counters, and some moments are not told by them: in the middle of a gradient
accumulation, whose gradients it forgets; before a validation is through, which a resume would leave out or finish with
a part of the pictures; when a batch is announced but not begun, which a resume would count twice; and at an epoch's
end, where a resume would make the next step too early.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from v2flow.ranks import world

_GRADIENTS = "accumulated_gradients"


class ExactResumeCallback(Callback):
    """Completes every checkpoint, and what is restored from one.

    Gradients of an accumulation that has begun are saved with it, the mean over the ranks, so that a resume with
    another number of ranks goes on as well. So that one with the same number goes on bit for bit, each rank takes the
    mean in the place of its own gradients already at the validation after which it may be saved.
    """

    def __init__(self) -> None:
        self._validated = -1  # batches (of all epochs) after which the last validation ended
        self._gradients: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """The batches trained on when the last validation ended."""
        return {"validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._validated = state_dict["validated"]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets back the count of a validation that was interrupted, and shares the gradients amid accumulation."""
        # A validation that begins anew after a resume: Lightning counts the interrupted one's batch as begun.
        total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
        total.ready = total.started = total.processed = total.completed
        if is_accumulating(trainer):
            _share_gradients(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that the validation at this batch is done."""
        self._validated = _batches(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Corrects Lightning's loop state, and adds the gradients amid accumulation."""
        if trainer.fit_loop._data_fetcher is None:  # not in a fit
            return
        loop = checkpoint["loops"]["fit_loop"]
        accumulating = is_accumulating(trainer)
        if _batch_is_announced(trainer):
            _forget_announced_batch(trainer, loop)
        elif self._validated != _batches(trainer) and _validation_is_due(trainer):
            _put_validation_first(loop, accumulating)
        if accumulating:
            checkpoint[_GRADIENTS] = _gradients(pl_module)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the gradients that were saved amid accumulation."""
        self._gradients = checkpoint.get(_GRADIENTS, {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the gradients back, now that the parameters are on their device."""
        parameters = dict(pl_module.named_parameters())
        for name, gradient in self._gradients.items():
            parameters[name].grad = _like(gradient, parameters[name])
        self._gradients = {}
        _leave_finished_epoch(trainer)


def _leave_finished_epoch(trainer: Trainer) -> None:
    """Resume a checkpoint of an epoch's end with a new epoch; Lightning would count its batches to the old one.

    That is one of the last batch's `on_train_batch_end`, or one of `on_train_epoch_end`; which may have been called
    before the epoch's end, after the last step of a training that is now longer.
    """
    fit = trainer.fit_loop
    batches, epochs = fit.epoch_loop.batch_progress, fit.epoch_progress
    finished = batches.is_last_batch or batches.current.completed >= trainer.num_training_batches
    if finished and fit.restarted_mid_epoch and fit.epoch_loop.restarted_on_train_batch_end:
        fit.reset_restart_stage()  # the old epoch is counted by now, but the new one would not be
    elif finished and fit.restarted_on_epoch_end:
        epochs.increment_completed()
        fit.reset_restart_stage()
        fit.epoch_loop.restarting = False
    elif fit.restarted_on_epoch_end:
        counts: Any
        for counts in (epochs.total, epochs.current):
            counts.processed -= 1
        fit.update_restart_stage()
        if _validation_is_due(trainer):  # it was done, or has no batches: the loggers' step is counted again
            fit.epoch_loop._batches_that_stepped -= 1


def is_accumulating(trainer: Trainer) -> bool:
    """Whether the batches trained on last wait for others before the optimiser makes its step."""
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    done = current.processed
    return bool(done % trainer.accumulate_grad_batches != 0 and done != trainer.num_training_batches)


def _batches(trainer: Trainer) -> int:
    """Batches trained on, of all epochs."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(total.processed)


def _batch_is_announced(trainer: Trainer) -> bool:
    """Whether the next batch is announced (`on_train_batch_start`) but not begun."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return bool(total.ready != total.started)


def _validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the batch that was trained on last."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    return _batches(trainer) > 0 and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def _forget_announced_batch(trainer: Trainer, loop: dict[str, Any]) -> None:
    """Take back the announcement: a resume makes it again."""
    progress = loop["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        counts["ready"] = counts["started"]
    # If a validation came before it, a resume leaves that out, but counts the loggers' step again.
    epoch_loop = trainer.fit_loop.epoch_loop
    batches = progress["total" if trainer.check_val_every_n_epoch is None else "current"]["ready"]
    interval = trainer.val_check_batch
    if epoch_loop._should_check_val_epoch() and isinstance(interval, int) and batches % interval == 0:
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def _put_validation_first(loop: dict[str, Any], accumulating: bool) -> None:
    """Make a resume begin with a validation from its first batch: to Lightning it was interrupted in that batch."""
    progress = loop["epoch_loop.val_loop.batch_progress"]
    done = progress["total"]["completed"]
    progress["total"] |= {"ready": done + 1, "started": done + 1, "processed": done}
    progress["current"] = dict.fromkeys(progress["current"], 0)
    progress["is_last_batch"] = False
    batch = loop["epoch_loop.batch_progress"]["total"]
    if batch["completed"] < batch["processed"] and not accumulating:
        # Saved at a batch's end: a resume counts the loggers' step at its start, and again after the validation.
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


@torch.no_grad()
def _share_gradients(module: LightningModule) -> None:
    """Replace the gradients accumulated so far by their mean over the ranks; the step's is the same up to rounding."""
    _, ranks = world()
    for parameter in module.parameters():
        if ranks > 1 and parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            parameter.grad /= ranks
            torch.distributed.all_reduce(parameter.grad)


@torch.no_grad()
def _gradients(module: LightningModule) -> dict[str, Tensor]:
    """The gradients accumulated so far, whole and the mean over the ranks, on the CPU."""
    _share_gradients(module)
    found = {}
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            found[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).cpu()
    return found


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    gradient = gradient.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
    return gradient.clone()
