"""Exponential moving average of the weights, on Lightning's own callback.

While it validates, and from the end of the training on, the averaged weights stand in the module. A checkpoint's
`state_dict` is always the average and its `current_model_state` the raw weights, from which a training resumes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from v2flow.errors import V2FlowError

_LONGEST_HALF_LIFE = 0.05  # share of the run's steps


class EMACallback(WeightAveraging):
    """Averages parameters with decay min(decay, (1 + n)/(10 + n)) after n updates, so that short runs forget their
    first weights.

    Buffers (codebook statistics, residual scale) are copied, not averaged: a mean of codebooks is no codebook. What
    is frozen (parameters without gradient, buffers that no checkpoint stores) is shared with the average, not copied.

    Args:
        decay: largest decay. Where the length of the run is known, a decay whose half-life is longer than 5 % of it
            is lowered to that.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise V2FlowError(f"option decay of EMACallback: expected a number in [0, 1), found {decay}")
        self.decay = decay
        self._limit = decay
        self._validating = False
        self._finished = False
        super().__init__(use_buffers=False, multi_avg_fn=self._average)

    def decay_after(self, updates: int) -> float:
        """The decay of the update that follows `updates` of them."""
        return min(self._limit, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def _average(self, averaged: Any, current: Any, _updates: Tensor | int) -> None:
        assert self._average_model is not None
        pairs = [(a, c) for a, c in zip(averaged, current, strict=True) if a.is_floating_point()]
        if pairs:
            weight = 1 - self.decay_after(int(self._average_model.n_averaged))
            torch._foreach_lerp_([a for a, _ in pairs], [c for _, c in pairs], weight)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the average, without a second copy of what is frozen."""
        if stage != "fit":
            return
        self._validating = self._finished = False
        self._limit = min(self.decay, _longest_decay(trainer, pl_module))
        frozen = [(slots, name, slots[name]) for slots, name in _frozen(pl_module)]
        try:
            for slots, name, _ in frozen:
                slots[name] = None
            super().setup(trainer, pl_module, stage)
        finally:
            for slots, name, tensor in frozen:
                slots[name] = tensor
        self._share_frozen(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the module to its device, where its frozen buffers are new tensors."""
        assert self._average_model is not None
        self._share_frozen(pl_module)
        self._average_model.to(pl_module.device)
        # Read in every step: a count on the GPU would make the step wait for it.
        self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def _share_frozen(self, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        copies, parts = self._average_model.module.modules(), pl_module.modules()
        for copy, part in zip(copies, parts, strict=True):
            for slots, name in _frozen(part, recurse=False):
                (copy._buffers if slots is part._buffers else copy._parameters)[name] = slots[name]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average, unless `HealthCallback` has left the step out."""
        step = trainer.global_step
        if any(getattr(callback, "skipped_step", -1) == step for callback in trainer.callbacks):  # type: ignore[attr-defined]
            self._latest_update_step = step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the averaged weights in the place of the raw ones."""
        if self._average_model is not None and not self._finished:
            self._swap_models(pl_module)
            self._validating = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the raw weights back."""
        self._swap_back(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """An error or signal inside validation: the raw weights go back before anybody saves them."""
        self._swap_back(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module; the raw weights are kept for checkpoints that are saved from now on."""
        self._swap_models(pl_module)
        self._finished = True

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Saves both sets of weights; `state_dict` is the average.

        Raises:
            V2FlowError: called while the averaged weights stand in for the raw ones.
        """
        if self._validating:
            raise V2FlowError(
                "checkpoint: asked for inside validation, while averaged weights stand in for the raw ones; "
                "save after validation"
            )
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._finished:
            average, raw = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, raw

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """To train on, the raw weights go into the module; to score, the average, as after the training's end."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
        elif self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
            self._swap_models(pl_module)
            self._finished = True

    def _swap_back(self, pl_module: LightningModule) -> None:
        if self._validating:
            self._swap_models(pl_module)
            self._validating = False


def _frozen(module: nn.Module, recurse: bool = True) -> Iterator[tuple[dict[str, Any], str]]:
    """Where frozen tensors hang: the dictionary of a module's buffers or parameters, and the name in it."""
    for part in module.modules() if recurse else [module]:
        for name in part._non_persistent_buffers_set:
            if part._buffers[name] is not None:
                yield part._buffers, name
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                yield part._parameters, name


def _longest_decay(trainer: Trainer, pl_module: LightningModule) -> float:
    """The decay whose half-life is 5 % of the run; 1 when the run's length is not known.

    The module's own clock comes first: it is the same in a run that is stopped early and resumed.
    """
    optimizer = getattr(pl_module, "optimizer_config", None)
    steps = optimizer.total_steps if optimizer is not None else trainer.max_steps
    return 0.5 ** (1 / (_LONGEST_HALF_LIFE * steps)) if steps > 0 else 1.0
