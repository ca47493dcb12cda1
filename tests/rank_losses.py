"""Trainings in processes of their own, and a callback that tells what each rank's losses were."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from loopback import free_port


class RankLosses(Callback):
    """Writes each rank's own training losses, as they are logged step by step, to `folder/{ranks}-{rank}.json`, and the
    last validation's loss, over all ranks, to `folder/{ranks}-val.json`."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.losses.append(trainer.callback_metrics["train/loss"].item())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = Path(self.folder, f"{trainer.world_size}-{trainer.global_rank}.json")
        path.write_text(json.dumps(self.losses))
        if trainer.is_global_zero and "val/visual" in trainer.callback_metrics:
            held_out = Path(self.folder, f"{trainer.world_size}-val.json")
            held_out.write_text(json.dumps(trainer.callback_metrics["val/visual"].item()))


def rank_losses(folder: Path) -> tuple[str, str]:
    """Options of `v2flow fit` that add the callback."""
    return "--trainer.callbacks+=rank_losses.RankLosses", f"--trainer.callbacks.folder={folder}"


def validation_loss(folder: Path, ranks: int) -> float:
    """Of stage 2, at the end of the training."""
    found: float = json.loads((folder / f"{ranks}-val.json").read_text())
    return found


def losses(folder: Path, ranks: int) -> list[float]:
    """Means over the ranks of the losses of each step, which are not the same on all of them."""
    found = [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
    assert ranks == 1 or found[0] != found[1], "no two ranks have the same samples"
    return [sum(step) / ranks for step in zip(*found, strict=True)]


def fit(file: str, *options: str) -> str:
    """Trains in processes of their own, which find this module; what they said."""
    command = [sys.executable, "-m", "v2flow", "fit", "--config", file, *options]
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr
