"""DDP on two CPU processes does to the tokenizer what one process with the doubled batch does."""

from pathlib import Path
from typing import Any

import pytest
from rank_losses import fit, losses, rank_losses
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
    two = ("--trainer.devices=2", "--data.batch_size=2", "--trainer.strategy=ddp_local_buffers")
    for options in ((), two):
        fit(file, *rank_losses(tmp_path), *options)
    alone = losses(tmp_path, 1)
    assert len(alone) == STEPS and len(set(alone)) == STEPS
    assert losses(tmp_path, 2) == pytest.approx(alone, rel=1e-4)
