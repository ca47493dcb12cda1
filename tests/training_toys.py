"""A small experiment file and shards for it, for tests that train through the command line."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml
from data_toys import encode, write_tar

PICTURES = 24


def write_shards(folder: Path) -> dict[str, str]:
    """Shards `train` and `val` of 16 px pictures without captions."""
    generator = torch.Generator().manual_seed(0)
    shards = {}
    for split, count in (("train", PICTURES), ("val", 6)):
        members = []
        for index in range(count):
            pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=generator)
            members.append((f"{split}{index:03d}.png", encode(pixels.numpy())))
        shards[split] = write_tar(folder / f"{split}-000000.tar", members)
    return shards


TOKENIZER = {
    "image_size": 16,
    "vocabulary": {"source": "random", "size": 64, "dim": 16},
    "resampler": {"width": 8, "depth": 1, "token_grid": [4, 4], "key_dim": 8},
    "visual_vocabulary": {"size": 32},
    "decoder": {"width": 16, "heads": 2, "encoder_depth": 1, "decoder_depth": 1},
    "velocity": {"width": 16, "heads": 2, "depth": 1},
}
"""Options of a small tokenizer in an experiment file."""


def experiment(shards: dict[str, str], folder: Path, **trainer: Any) -> dict[str, Any]:
    """A small experiment that validates every two steps, with the callbacks of the shipped ones."""
    training = "v2flow.training"
    return {
        "seed_everything": 1,
        "model": {
            "class_path": f"{training}.tokenizer_module.TokenizerModule",
            "init_args": {
                "seed": "${...seed_everything}",
                "tokenizer": deepcopy(TOKENIZER),
                "optimizer": {"total_steps": 4, "warmup_steps": 1},
            },
        },
        "data": {
            **shards,
            "batch_size": 4,
            "eval_batch_size": 4,
            "num_workers": 0,
            "seed": "${..seed_everything}",
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": "${..model.init_args.optimizer.total_steps}",
            "max_epochs": -1,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(folder), "name": "run"},
            },
            "callbacks": [
                {"class_path": f"{training}.ema.EMACallback", "init_args": {"decay": 0.9}},
                {
                    "class_path": f"{training}.metric_callbacks.ReconstructionCallback",
                    "init_args": {"grid_images": 2, "final_features": False},
                },
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {
                        "monitor": "val/psnr",
                        "mode": "max",
                        "filename": "best-{step}",
                    },
                },
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"filename": "last", "enable_version_counter": False},
                },
                {"class_path": f"{training}.progress.RunProgressBar"},
            ],
            **trainer,
        },
    }


def write(config: dict[str, Any], path: Path) -> str:
    path.write_text(yaml.safe_dump(config))
    return str(path)
