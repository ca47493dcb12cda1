"""What `v2flow fit|validate|test` leave of their own: the run's configuration, and its figures for a program."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from v2flow.metrics.files import write_json
from v2flow.training.run_files import log_directory, logged_figures


class RunConfigCallback(SaveConfigCallback):
    """Writes config.yaml into the run's own folder.

    Lightning's own takes the logger's folder, which a W&B logger shares among all runs, and refuses to run again where
    one lies.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **(options | {"save_to_log_dir": False}))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the folder, on every rank, and writes on the first."""
        self._directory = log_directory(trainer)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the file; every rank but the first is left out by Lightning."""
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / self.config_filename
        self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=self.multifile)


def write_figures(trainer: Trainer, path: str | None) -> None:
    """Writes step and figures logged last, `{"step": …, "figures": {"val/psnr": …}}`; without a path, nothing."""
    if path is None or not trainer.is_global_zero:
        return
    figures = dict(sorted(logged_figures(trainer).items()))
    write_json(path, {"step": trainer.global_step, "figures": figures})
