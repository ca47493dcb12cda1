"""A callback for tests of several processes, which run the command in processes of their own."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class RankLosses(Callback):
    """Writes each rank's own training losses, as they are logged step by step, to `folder/{ranks}-{rank}.json`."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.losses.append(trainer.callback_metrics["train/loss"].item())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = Path(self.folder, f"{trainer.world_size}-{trainer.global_rank}.json")
        path.write_text(json.dumps(self.losses))


def rank_losses(folder: Path) -> tuple[str, str]:
    """Options of `v2flow fit` that add the callback."""
    return "--trainer.callbacks+=rank_losses.RankLosses", f"--trainer.callbacks.folder={folder}"


def losses(folder: Path, ranks: int) -> list[float]:
    """Means over the ranks of the losses of each step, which are not the same on all of them."""
    found = [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
    assert ranks == 1 or found[0] != found[1], "no two ranks have the same samples"
    return [sum(step) / ranks for step in zip(*found, strict=True)]
