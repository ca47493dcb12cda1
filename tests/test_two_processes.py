"""DDP on two CPU processes does to the tokenizer what one process with the doubled batch does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rank_losses import losses, rank_losses
from training_toys import experiment, write, write_shards

STEPS = 6


def without_draws(folder: Path) -> dict[str, Any]:
    """An experiment none of whose draws depends on the rank: all latents are masked, no code is revived, and the
    field, with its noise, learns after the last step."""
    config = experiment(write_shards(folder), folder, callbacks=[], limit_val_batches=0, logger=False)
    config["trainer"] |= {
        "val_check_interval": None,
        "enable_checkpointing": False,
        "default_root_dir": str(folder),
    }
    options = config["model"]["init_args"]
    options["optimizer"] = {"total_steps": STEPS, "warmup_steps": 1, "lr": 0.003}
    tokenizer = options["tokenizer"]
    tokenizer["velocity"]["alone"] = 0.01
    tokenizer["visual_vocabulary"]["revive_below"] = 0.0
    tokenizer["decoder"] |= {"full_mask_share": 1.0, "null_probability": 0.0}
    return config


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    """Gradients and codebook statistics are those of the doubled batch; buffers are not broadcast."""
    file = write(without_draws(tmp_path), tmp_path / "experiment.yaml")
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    two = ("--trainer.devices=2", "--data.batch_size=2", "--trainer.strategy=ddp_local_buffers")
    for options in ((), two):
        command = [sys.executable, "-m", "v2flow", "fit", "--config", file, *rank_losses(tmp_path), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    alone = losses(tmp_path, 1)
    assert len(alone) == STEPS and len(set(alone)) == STEPS
    assert losses(tmp_path, 2) == pytest.approx(alone, rel=1e-4)
