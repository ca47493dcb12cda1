"""Keeps a training from being spoilt unseen: steps that are not finite are left out, what goes wrong is named."""

import logging
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from v2flow.errors import V2FlowError
from v2flow.metrics.codebook import codebook_statistics
from v2flow.training.interruption import last_checkpoint, save_last
from v2flow.training.resume import is_accumulating

_log = logging.getLogger(__name__)

_BEGUN = "step_begun"  # its key in a checkpoint
_HISTORY = 20  # log intervals that say what a usual gradient is
_ADVICE = {
    "exploding gradients": "lower optimizer.lr, lengthen optimizer.warmup_steps or set trainer.gradient_clip_val",
    "codebook collapse": "raise visual_vocabulary.revive_below, or lower optimizer.lr",
    "entropy collapse": "a saturated softmax passes no gradient: lower resampler.scale, its noise or optimizer.lr",
}


class HealthCallback(Callback):
    """Leaves out optimiser steps with a loss or gradient that is not finite, and names what goes wrong.

    A step that is left out changes neither weights nor optimiser, averaged weights or codebooks; the clock and the
    data go on. It is counted as `health/skipped_steps`; `health/gradient_norm` is the norm before clipping. Every
    `log_every_n_steps` the norms, the codebooks and the tokens' entropy are looked at, and each ailment is a warning
    with advice when it begins.

    Args:
        skip_nonfinite: leave out steps that are not finite; reads one number of the device each optimiser step.
        max_skipped: so many of them in a row stop the training, with a checkpoint.
        patience: looks in a row that a collapse has to last.
        entropy_below: entropy of the tokens' distributions, in nats, below which they are called collapsed.
        perplexity_below: share of a codebook's size below which its perplexity is called collapsed.
        spike: a gradient so many times as long as usual is called exploding.

    Attributes:
        skipped_step: `global_step` after the step that was left out last.
    """

    def __init__(
        self,
        skip_nonfinite: bool = True,
        max_skipped: int = 10,
        patience: int = 5,
        entropy_below: float = 0.1,
        perplexity_below: float = 0.05,
        spike: float = 50.0,
    ) -> None:
        for name, value in (("max_skipped", max_skipped), ("patience", patience)):
            if value < 1:
                raise V2FlowError(f"option {name} of HealthCallback: expected at least 1, found {value}")
        self.skip_nonfinite, self.max_skipped = skip_nonfinite, max_skipped
        self.patience, self.spike = patience, spike
        self.entropy_below, self.perplexity_below = entropy_below, perplexity_below
        self.skipped_step = -1
        self._skipped = self._in_a_row = 0
        self._finite: Tensor | None = None  # whether the losses of this step were
        self._norms: list[Tensor] = []  # since the last look
        self._usual: list[float] = []  # of the last looks
        self._seen_entropy = False
        self._lasting: dict[str, int] = {}  # ailment -> looks in a row
        self._buffers: dict[str, Tensor] = {}  # codebooks and other statistics before this step
        self._restored: dict[str, Any] = {}  # what was known amid an accumulation
        self._error: V2FlowError | None = None

    def state_dict(self) -> dict[str, Any]:
        """Counts and usual values, so that a resumed run judges as before."""
        return {
            "skipped": self._skipped, "in_a_row": self._in_a_row, "usual": list(self._usual),
            "norms": [float(norm) for norm in self._norms], "lasting": dict(self._lasting),
            "seen_entropy": self._seen_entropy,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]
        self._usual, self._lasting = list(state_dict["usual"]), dict(state_dict["lasting"])
        self._norms = [torch.tensor(norm) for norm in state_dict["norms"]]
        self._seen_entropy = state_dict["seen_entropy"]

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Amid an accumulation, adds what a resume needs to leave out the step that has begun."""
        if self.skip_nonfinite and self._finite is not None and is_accumulating(trainer):
            buffers = {name: copy.cpu() for name, copy in self._buffers.items()}
            checkpoint[_BEGUN] = {"finite": _on_every_rank(self._finite), "buffers": buffers}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes what was saved amid an accumulation."""
        self._restored = checkpoint.get(_BEGUN, {})

    # --- steps that are not finite -----------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes copies of the buffers that a step which is left out must not change."""
        self._finite, self._error = None, None
        self._norms = [norm.to(pl_module.device) for norm in self._norms]
        saved = pl_module.state_dict().keys() if self.skip_nonfinite else ()
        self._buffers = {name: value.clone() for name, value in pl_module.named_buffers() if name in saved}
        if self._restored and self.skip_nonfinite:
            self._finite = torch.tensor(self._restored["finite"], device=pl_module.device)
            for name, copy in self._buffers.items():
                copy.copy_(self._restored["buffers"][name])
        self._restored = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops after too many skipped steps in a row; otherwise copies the buffers."""
        if self._in_a_row >= self.max_skipped:
            self._stop(trainer)
        if not is_accumulating(trainer):
            for name, copy in self._buffers.items():
                copy.copy_(pl_module.get_buffer(name))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Notes whether the loss is finite."""
        finite = loss.detach().isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Leaves the step out, on all ranks, if the loss or a gradient is not finite on one of them."""
        norm = _gradient_norm(optimizer).to(pl_module.device)
        finite = norm.isfinite() & (self._finite if self._finite is not None else True)
        self._finite = None
        if self.skip_nonfinite and not _on_every_rank(finite):
            self._skip(trainer, pl_module, optimizer)
        else:
            self._in_a_row = 0
            self._norms.append(norm)
        pl_module.log("health/gradient_norm", norm, on_step=True, on_epoch=False)
        pl_module.log("health/skipped_steps", float(self._skipped), on_step=True, on_epoch=False)

    def _skip(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)  # without gradients a step does nothing
        for name, copy in self._buffers.items():
            pl_module.get_buffer(name).copy_(copy)
        self._skipped += 1
        self._in_a_row += 1
        self.skipped_step = trainer.global_step + 1
        if self._in_a_row == 1 and trainer.is_global_zero:
            _log.warning(
                "health: step %d is left out: its loss or gradient is not finite (%d so far)",
                self.skipped_step,
                self._skipped,
            )

    def _stop(self, trainer: Trainer) -> None:
        count, self._in_a_row = self._in_a_row, 0
        path = last_checkpoint(trainer)
        saved = f"; the weights before them are in {path}: start from them with --init-from" if path else ""
        self._error = V2FlowError(
            f"training: {count} steps in a row, the last one step {trainer.global_step}, had a loss or gradient that "
            f"is not finite{saved}, a lower optimizer.lr or more optimizer.warmup_steps; "
            "--trainer.detect_anomaly=true names the operation"
        )
        raise self._error

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves a checkpoint where this callback has stopped the training."""
        if exception is self._error:
            save_last(trainer)

    # --- what goes wrong slowly --------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks for collapse and growing norms at every logged step."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and not is_accumulating(trainer) and trainer.global_step % every == 0:
            self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._norms:
            norms = torch.stack(self._norms)
            usual, longest = torch.stack([norms.median(), norms.max()]).tolist()
            self._norms = []
            before = median(self._usual) if len(self._usual) >= self.patience else float("inf")
            self._report(
                trainer, "exploding gradients", longest > self.spike * before, 1,
                f"a gradient of norm {longest:.3g}, where {before:.3g} is usual",
            )  # fmt: skip
            self._usual = [*self._usual, usual][-_HISTORY:]
        entropy = trainer.callback_metrics.get("train/token_entropy")
        if entropy is not None:
            nats = float(entropy)
            self._seen_entropy |= nats > 0  # without a vocabulary there is none
            self._report(
                trainer, "entropy collapse", self._seen_entropy and nats < self.entropy_below, self.patience,
                f"the tokens' distributions are one-hot ({nats:.3g} nats)",
            )  # fmt: skip
        for name, size, perplexity in _codebooks(pl_module):
            pl_module.log(f"health/perplexity_{name}", perplexity, on_step=True, on_epoch=False)
            self._report(
                trainer, "codebook collapse", perplexity < self.perplexity_below * size, self.patience,
                f"{name} has a perplexity of {perplexity:.1f} with {size} codes",
            )  # fmt: skip

    def _report(self, trainer: Trainer, ailment: str, there: bool, patience: int, what: str) -> None:
        """One warning when an ailment has lasted so many looks; another one only after it was gone."""
        self._lasting[ailment] = self._lasting.get(ailment, 0) + 1 if there else 0
        if self._lasting[ailment] == patience and trainer.is_global_zero:
            _log.warning(
                "health: %s at step %d: %s; %s", ailment, trainer.global_step, what, _ADVICE[ailment]
            )


def _gradient_norm(optimizer: Optimizer) -> Tensor:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _on_every_rank(finite: Tensor) -> bool:
    """Losses differ by rank, but all must leave out the same steps."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        number = finite.int()
        dist.all_reduce(number, op=dist.ReduceOp.MIN)
        return bool(number)
    return bool(finite)


def _codebooks(module: nn.Module) -> list[tuple[str, int, float]]:
    """Name, size K and perplexity of every codebook that counts its codes in training."""
    found = []
    for prefix, part in module.named_modules():
        counts = part._buffers.get("counts", part._buffers.get("cluster_size"))
        if counts is None or not part.training:
            continue
        perplexity = codebook_statistics(counts.flatten())["perplexity"]
        found.append((prefix.removeprefix("model."), counts.numel(), perplexity))
    return found
