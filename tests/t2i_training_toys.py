"""A small tokenizer, captioned pictures, their token shards and an experiment of stage 2, for tests that train."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from data_toys import encode, write_tar

from v2flow import V2FlowTokenizer
from v2flow.config import (
    DecoderConfig,
    ResamplerConfig,
    TokenizerConfig,
    VelocityConfig,
    VisualVocabularyConfig,
    VocabularyConfig,
)
from v2flow.data.tokens import build_tokens

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}
CAPTIONS = [f"{count} {colour} things" for count in ("one", "two", "a few") for colour in COLOURS]


def toy_tokenizer(
    size: int = 32, grid: tuple[int, int] = (2, 2), seed: int = 0, dim: int = 64
) -> V2FlowTokenizer:
    """Of 16 px pictures; random weights, and codes of the width of `gpt2-style:tiny`."""
    torch.manual_seed(seed)
    config = TokenizerConfig(
        image_size=16,
        vocabulary=VocabularyConfig(source="random", size=64, dim=dim),
        resampler=ResamplerConfig(width=8, depth=1, token_grid=list(grid), key_dim=8),
        visual_vocabulary=VisualVocabularyConfig(size=size),
        decoder=DecoderConfig(width=16, heads=2, encoder_depth=1, decoder_depth=1),
        velocity=VelocityConfig(width=16, heads=2, depth=1),
    )
    return V2FlowTokenizer(config).eval()


def write_pictures(
    folder: Path, counts: dict[str, int] | None = None, captions: dict[int, str] | None = None
) -> str:
    """Captioned shards train, val and test of noisy coloured pictures with a json of their own. Gives a glob.

    Args:
        captions: other captions by number of the picture.
    """
    generator = torch.Generator().manual_seed(0)
    for split, count in (counts or {"train": 24, "val": 6, "test": 6}).items():
        members = []
        for index in range(count):
            caption = CAPTIONS[index % len(CAPTIONS)]
            colour = torch.tensor(COLOURS[caption.split()[-2]])
            said = (captions or {}).get(index, caption)
            noise = torch.randint(-40, 40, (16, 16, 3), generator=generator)
            pixels = (colour + noise).clamp(0, 255).to(torch.uint8).numpy()
            key = f"{split}{index:03d}"
            members += [(f"{key}.png", encode(pixels)), (f"{key}.txt", said.encode())]
            members += [(f"{key}.json", json.dumps({"number": index}).encode())]
        write_tar(folder / f"{split}-000000.tar", members)
    return str(folder / "*.tar")


class Toys:
    """An exported tokenizer, pictures and token shards in one folder."""

    def __init__(self, folder: Path) -> None:
        self.pictures = write_pictures(folder / "pictures")
        self.tokenizer = str(folder / "tokenizer")
        toy_tokenizer().save_pretrained(self.tokenizer)
        self.tokens = folder / "tokens"
        build_tokens(self.tokenizer, self.pictures, self.tokens, progress=False)

    def shards(self, split: str) -> str:
        return str(self.tokens / f"{split}-*.tar")

    def config(self, **options: Any) -> dict[str, Any]:
        """Options of `TextToImageConfig`."""
        return {
            "tokenizer": self.tokenizer, "llm": "gpt2-style:tiny", "pictures": self.pictures, "max_caption": 24,
            **options,
        }  # fmt: skip

    def experiment(self, folder: Path, **options: Any) -> dict[str, Any]:
        """A small experiment that validates every two steps."""
        return {
            "seed_everything": 1,
            "model": {
                "class_path": "v2flow.training.t2i_module.TextToImageModule",
                "init_args": {
                    "seed": "${...seed_everything}",
                    "text_to_image": self.config(**options),
                    "optimizer": {"total_steps": 4, "warmup_steps": 1},
                },
            },
            "data": {
                "train": self.shards("train"), "val": self.shards("val"), "test": self.shards("test"),
                "batch_size": 4, "length_window": 16, "seed": "${..seed_everything}",
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
                "gradient_clip_val": 1.0,
                "enable_model_summary": False,
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": str(folder), "name": "run"},
                },
                "callbacks": [
                    {
                        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                        "init_args": {"filename": "last", "enable_version_counter": False},
                    },
                    {"class_path": "v2flow.training.progress.RunProgressBar"},
                ],
            },
        }  # fmt: skip

    def write(self, folder: Path, **options: Any) -> str:
        """The path of that experiment's file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "experiment.yaml"
        path.write_text(yaml.safe_dump(self.experiment(folder, **options)))
        return str(path)
