"""Exponential moving average of the weights, on Lightning's own callback.

During validation the averaged weights stand in the module; a checkpoint's `state_dict` is the average and its
`current_model_state` the raw weights.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from v2flow.errors import V2FlowError


class EMACallback(WeightAveraging):
    """Averages parameters with decay min(decay, (1 + n)/(10 + n)) after n updates, so that short runs forget their
    first weights.

    Buffers (codebook statistics, residual scale) are copied, not averaged: a mean of codebooks is no codebook. What
    is frozen is shared with the copy, not stored twice.

    Args:
        decay: largest decay; its half-life ln 2/(1 − decay) should be at most 5 % of the run's steps.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise V2FlowError(f"option decay of EMACallback: expected a number in [0, 1), found {decay}")
        self.decay = decay
        self._swapped = False
        super().__init__(use_buffers=False, multi_avg_fn=self._average)

    def decay_after(self, updates: int) -> float:
        """The decay of the update that follows `updates` of them."""
        return min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def _average(self, averaged: Any, current: Any, updates: Tensor | int) -> None:
        live = [(a, c) for a, c in zip(averaged, current, strict=True) if a is not c and a.is_floating_point()]
        weight = 1 - self.decay_after(int(updates))
        torch._foreach_lerp_([a for a, _ in live], [c for _, c in live], weight)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Share what is frozen; only now is the module on its device."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)
        for copy, part in zip(self._average_model.module.modules(), pl_module.modules(), strict=True):
            for name in part._non_persistent_buffers_set:
                copy._buffers[name] = part._buffers[name]
            for name, parameter in part._parameters.items():
                if parameter is not None and not parameter.requires_grad:
                    copy._parameters[name] = parameter

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        self._swapped = self._average_model is not None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_back(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """An error or signal inside validation: the raw weights go back before anybody saves them."""
        self._swap_back(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._swapped:
            raise V2FlowError("checkpoint: asked for while the averaged weights stand in for the raw ones; save after it")
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def _swap_back(self, pl_module: LightningModule) -> None:
        if self._swapped:
            self._swap_models(pl_module)
            self._swapped = False
