"""Where a run's files lie, and what callbacks leave there beside the logger's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from v2flow.evaluate import describe_shards
from v2flow.metrics.files import append_json_line


def log_directory(trainer: Trainer) -> Path:
    """The run's own folder; every rank must call it (it is broadcast).

    It is the logger's, or the trainer's root without a logger. Loggers with one folder for all runs, as W&B's, get
    SAVE_DIR/NAME/VERSION in it, where Lightning puts the run's checkpoints as well.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None or isinstance(logger, (CSVLogger, TensorBoardLogger)):
        return Path(trainer.log_dir or trainer.default_root_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    # Only the first rank's logger knows them: the name of a W&B run is drawn when it starts.
    where = (logger.save_dir or trainer.default_root_dir, str(logger.name), version)
    return Path(*trainer.strategy.broadcast(where))


def record_validation(trainer: Trainer, figures: Mapping[str, float]) -> None:
    """Adds a validation's figures to LOGDIR/validation.jsonl; every rank must call it."""
    directory = log_directory(trainer)
    if trainer.is_global_zero and not is_dry_run(trainer):
        append_json_line(directory / "validation.jsonl", {"step": trainer.global_step, **figures})


def logged_figures(trainer: Trainer) -> dict[str, float]:
    """The figures logged last, by name, without those that are not finite: strict JSON has no word for them."""
    return {name: value.item() for name, value in trainer.callback_metrics.items() if value.isfinite()}


def grid_file(trainer: Trainer, directory: Path, stage: str) -> Path:
    """Where a grid goes: DIRECTORY/grids/step-XXXXXX.png of a validation, test.png of a test."""
    name = "test" if stage == "test" else f"step-{trainer.global_step:06d}"
    return directory / "grids" / f"{name}.png"


def is_dry_run(trainer: Trainer) -> bool:
    """Whether the trainer only tries out a few batches (`fast_dev_run`)."""
    return bool(getattr(trainer, "fast_dev_run", False))


def shows_progress(trainer: Trainer) -> bool:
    """Whether this process shows progress bars."""
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


def describe_data(trainer: Trainer) -> dict[str, Any]:
    """The validation data, as the protocol beside the figures names it."""
    shards = getattr(getattr(trainer, "datamodule", None), "val", None)
    return (describe_shards(shards) if shards else {}) | {
        "split": "val",
        "limit_val_batches": trainer.limit_val_batches,
    }


def written_checkpoints(trainer: Trainer) -> dict[str, str]:
    """The best and the last checkpoint, as far as they were written."""
    best = last = ""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            if callback.monitor is not None:
                best = callback.best_model_path or best
            # Without a monitor Lightning calls the newest checkpoint its best.
            newest = callback.best_model_path if callback.monitor is None else ""
            last = callback.last_model_path or newest or last
    return {name: path for name, path in (("best checkpoint", best), ("last checkpoint", last)) if path}


def scored_checkpoint(trainer: Trainer) -> str:
    """The checkpoint written at the last step, which holds the weights just scored; "" if there is none.

    `last.ckpt` need not be it: with a monitor Lightning writes it only when the monitored value improves.
    """
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "_last_global_step_saved", None) == trainer.global_step:
            return str(getattr(callback, "_last_checkpoint_saved", ""))
    return ""
