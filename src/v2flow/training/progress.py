"""One progress bar over the whole training, with the time that is left; Lightning's own bars start anew each epoch."""

import sys
import time
from typing import Any, Optional

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class SteadyBar(tqdm):
    """A bar whose rate, time left and refreshes stand on the monotonic clock: nobody can set that."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if not self.disable:
            self._time = time.monotonic
            self.start_t = self.last_print_t = self._time()

    def due(self) -> bool:
        """Whether `update` will draw the bar, if that moves it."""
        return not self.disable and self._time() - self.last_print_t >= self.mininterval


class RunProgressBar(ProgressBar):
    """Shows optimiser steps of the run, time left and the metrics logged with `prog_bar=True`.

    Args:
        log_interval: seconds between two lines where standard error is a file and not a terminal.
    """

    def __init__(self, log_interval: float = 30.0) -> None:
        super().__init__()
        self.log_interval = log_interval
        self._enabled = True
        self._bar: Optional[SteadyBar] = None
        self._evaluation: Optional[SteadyBar] = None

    def disable(self) -> None:
        """Shows nothing from now on."""
        self._enabled = False

    def enable(self) -> None:
        """Shows bars again."""
        self._enabled = True

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Prints above the bar."""
        tqdm.write(sep.join(map(str, args)), file=sys.stderr)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the bar of all steps, at the one that the run stands at."""
        self._bar = self._make("train", total_steps(trainer), initial=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar, and shows the newest figures where it is drawn: to read them is to wait for the device."""
        bar, step = self._bar, trainer.global_step
        if bar is None or step == bar.n:
            return
        if not bar.due() and step != bar.total:
            bar.n = step
            return
        metrics = {
            name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"
        }
        bar.set_postfix(metrics, refresh=False)
        bar.update(step - bar.n)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the bars."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the bars."""
        self._close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the bar of the validation batches."""
        self._start_evaluation(trainer.num_val_batches)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Moves it."""
        if self._evaluation is not None:
            self._evaluation.update()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes it."""
        self._end_evaluation()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the bar of the test batches."""
        self._start_evaluation(trainer.num_test_batches)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Moves it."""
        if self._evaluation is not None:
            self._evaluation.update()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes it."""
        self._end_evaluation()

    def _start_evaluation(self, batches: Any) -> None:
        counts = batches if isinstance(batches, list) else [batches]
        total = None if float("inf") in counts else int(sum(counts))
        self._evaluation = self._make("evaluate", total, leave=False)

    def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def _make(self, name: str, total: Optional[int], initial: int = 0, leave: bool = True) -> SteadyBar:
        terminal = sys.stderr.isatty()
        return SteadyBar(
            desc=name,
            total=total,
            initial=initial,
            leave=leave,
            delay=0.0 if leave else 2.0,  # a quick evaluation needs no bar
            unit="step" if name == "train" else "batch",
            dynamic_ncols=terminal,
            miniters=1,  # each step looks at the clock: no thread that watches the bar is needed
            mininterval=0.5 if terminal else self.log_interval,
            maxinterval=10.0 if terminal else 2 * self.log_interval,
            disable=not self._enabled,
        )

    def _close(self) -> None:
        self._end_evaluation()
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def total_steps(trainer: Trainer) -> Optional[int]:
    """Optimiser steps at which the trainer stops, as far as steps or epochs say so; None if only time does.

    `Trainer.estimated_stepping_batches` is not asked: reading it can set up the loaders anew.
    """
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
    if epochs > 0 and trainer.num_training_batches != float("inf"):
        limits.append(epochs * -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches))
    return min(limits) if limits else None
