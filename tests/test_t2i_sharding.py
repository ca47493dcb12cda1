"""FSDP2 on two CPU processes does what one process does, and leaves a checkpoint that one process reads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from t2i_training_toys import Toys

from v2flow.t2i.checkpoint import load_text_to_image
from v2flow.t2i.config import TextToImageConfig
from v2flow.training.t2i_module import TextToImageModule


@pytest.mark.slow
def test_two_shards_learn_what_one_process_learns(tmp_path: Path) -> None:
    toys = Toys(tmp_path / "toys")
    # No draws, which differ between ranks: captions stay, and all positions are under the visual columns.
    file = toys.write(tmp_path, caption_dropout=0.0, full_share=0.0)
    two = (
        "--trainer.devices=2", "--data.batch_size=2",
        "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
        "--trainer.strategy.data_parallel_size=2", "--trainer.strategy.tensor_parallel_size=1",
        "--trainer.strategy.save_distributed_checkpoint=false",
    )  # fmt: skip
    module = TextToImageModule(TextToImageConfig(**toys.config(caption_dropout=0.0, full_share=0.0)))
    torch.save(module.state_dict(), tmp_path / "start.ckpt")
    for options in ((), two):
        command = [sys.executable, "-m", "v2flow", "fit", "--config", file, *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    paths = [tmp_path / "run" / f"version_{i}" / "checkpoints" / "last.ckpt" for i in range(2)]
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert set(one) == set(other)
    start = torch.load(tmp_path / "start.ckpt", weights_only=True)
    assert start.keys() == one.keys()
    for name in start:
        assert not torch.equal(one[name], start[name])
        assert torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-5), name
    assert load_text_to_image(paths[1]).num_tokens == 4
