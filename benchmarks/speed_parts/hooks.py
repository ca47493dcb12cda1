"""What the callbacks of every training cost: the time in their hooks as a share of the training step around them."""

import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict
from io import StringIO
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from speed_parts.operators import DeviceReads
from v2flow.benchmark.overhead import Spread
from v2flow.benchmark.subject import CLIP
from v2flow.training.ema import EMACallback
from v2flow.training.health import HealthCallback
from v2flow.training.module import ReconstructionModule
from v2flow.training.progress import RunProgressBar

HOOKS = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip
WARMUP = 2


class _Clock(Callback):
    """Notes when each step begins, and the seconds and device reads of other callbacks' hooks in it."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.seconds: list[dict[str, float]] = []
        self.reads: dict[str, dict[str, int]] = {}

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())
        self.seconds.append({})

    def watch(self, callback: Callback) -> None:
        """Put a watch around each hook of a callback."""
        name = type(callback).__name__
        self.reads[name] = {}
        for hook in HOOKS:
            setattr(callback, hook, self._timed(name, getattr(callback, hook)))

    def _timed(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> None:
            if len(self.starts) == WARMUP:  # thrown away, and not the first, which some callbacks begin with
                with DeviceReads() as counter:
                    hook(*arguments)
                for place, count in counter.where.items():
                    self.reads[name][place] = self.reads[name].get(place, 0) + count
                return
            start = time.perf_counter()
            hook(*arguments)
            step = self.seconds[-1]
            step[name] = step.get(name, 0.0) + time.perf_counter() - start

        return timed


def hook_costs(module: ReconstructionModule, images: Tensor, steps: int) -> dict[str, Any]:
    """Trains a module under Lightning on one batch `[B, 3, H, W]`; its weights change.

    Returns:
        `step_seconds` (spread) from the start of a step to that of the next, and for each callback `share` of it
        (spread) and `device_reads` a step.
    """
    clock, callbacks = _Clock(), [HealthCallback(), EMACallback(), RunProgressBar()]
    for callback in callbacks:
        clock.watch(callback)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=steps + 1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, gradient_clip_val=CLIP, log_every_n_steps=20, callbacks=[clock, *callbacks],
    )  # fmt: skip
    with redirect_stderr(StringIO()):  # the bar writes as into a file
        trainer.fit(module, DataLoader([{"image": images}] * (steps + 1), batch_size=None))
    periods = [b - a for a, b in zip(clock.starts, clock.starts[1:], strict=False)]
    rows = list(zip(periods, clock.seconds, strict=False))[WARMUP:]
    found = {
        name: {
            "share": asdict(Spread.of([seconds.get(name, 0.0) / period for period, seconds in rows])),
            "device_reads": clock.reads[name],
        }
        for name in clock.reads
    }
    return {"step_seconds": asdict(Spread.of([period for period, _ in rows])), "callbacks": found}
