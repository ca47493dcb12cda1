"""What a run leaves in TensorBoard, with a CSV logger and in W&B, each chosen by configuration alone."""

import csv
import importlib.util
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from t2i_training_toys import CAPTIONS, Toys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from training_toys import experiment, write, write_shards

from v2flow.cli import main
from v2flow.evaluate import evaluation_loader
from v2flow.images import load_image
from v2flow.training.checkpoint import load_model
from v2flow.training.logged_pictures import (
    MAP_SIDE,
    NO_CODE,
    SCALE,
    UNUSED,
    log_picture,
    tile,
    usage_map,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_shards(tmp_path_factory.mktemp("shards"))


def two_steps(shards: dict[str, str], folder: Path, *words: str) -> Path:
    """Trains two steps by the command, validates after them, and gives the only folder with a metrics.json."""
    path = folder / "e.yaml"
    if not path.exists():
        config = experiment(shards, folder, max_steps=2)
        config["model"]["init_args"]["decode_modes"] = {"one_step": {"steps": 1, "temperature": 0.0}}
        write(config, path)
    before = set(folder.rglob("metrics.json"))
    assert main(["fit", "--config", str(path), *words]) == 0
    (file,) = set(folder.rglob("metrics.json")) - before
    return file.parent


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0, "tensors": 0})
    events.Reload()
    return events


def picture(event: Any) -> Tensor:
    """uint8 [3, H, W] of an image event."""
    pixels = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


# --- pictures ---------------------------------------------------------------------------------------------------


def test_usage_map_of_known_counts() -> None:
    """Seven codes on three by three squares."""
    found = usage_map(torch.tensor([0, 1, 8, 64, 0, 0, 64]))
    side = math.ceil(MAP_SIDE / 3)
    assert found.shape == (3, 3 * side, 3 * side) and found.dtype == torch.uint8
    colours = [tuple(found[:, r * side + 1, c * side + 1].tolist()) for r in range(3) for c in range(3)]
    middle = tuple(
        round((a + b) / 2) for a, b in zip(SCALE[1], SCALE[2], strict=True)
    )  # 8 is half of 64 in logarithms
    expected = [UNUSED, SCALE[0], middle, SCALE[-1], UNUSED, UNUSED, SCALE[-1], NO_CODE, NO_CODE]
    assert all(
        abs(a - b) <= 1 for f, e in zip(colours, expected, strict=True) for a, b in zip(f, e, strict=True)
    )
    assert {tuple(c) for c in usage_map(torch.ones(4)).flatten(1).T.tolist()} == {SCALE[0]}
    assert usage_map(torch.zeros(5)).unique().tolist() == [0, 255]
    assert usage_map(torch.ones(16384)).shape == (3, MAP_SIDE, MAP_SIDE)


def test_tile_fills_short_rows() -> None:
    pictures = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    found = tile(pictures.split(3))
    assert found.shape == (3, 4, 6)
    assert found[0, ::2, ::2].tolist() == [[0, 1, 2], [3, 4, 255]]


# --- TensorBoard ------------------------------------------------------------------------------------------------


def test_tensorboard_shows_grid_codes_and_entropies(shards: dict[str, str], tmp_path: Path) -> None:
    folder = two_steps(shards, tmp_path)
    events = events_of(folder)
    assert set(events.Tags()["images"]) == {"val/grid", "val/codebook_usage_map"}
    (shown,) = events.Images("val/codebook_usage_map")
    assert shown.step == 2

    # The weights that were scored give the same codes.
    model, _ = load_model(folder / "checkpoints" / "last.ckpt", "ema")
    counts = torch.zeros(32, dtype=torch.long)
    entropies = []
    for batch in evaluation_loader(shards["val"], 16, 4):
        soft: Any = model.encode(batch["image"][batch["valid"]], return_soft=True)
        counts += soft.ids.flatten().bincount(minlength=32)
        entropies.append(soft.entropy)
    assert counts.sum() == 6 * 16
    assert torch.equal(picture(shown), usage_map(counts))

    assert events.Tags()["histograms"] == ["val/token_entropy_histogram"]
    (histogram,) = events.Histograms("val/token_entropy_histogram")
    expected = torch.cat(entropies)[:2]  # of the pictures of the grid
    value = histogram.histogram_value
    assert value.num == expected.numel() == 2 * 16
    assert (value.min, value.max) == pytest.approx((expected.min().item(), expected.max().item()), abs=1e-4)
    assert 0 < value.min < value.max <= math.log(64) + 1e-5


def test_tensorboard_shows_pictures_of_captions(tmp_path: Path) -> None:
    toys = Toys(tmp_path)
    config = toys.experiment(tmp_path / "run")
    config["trainer"]["max_steps"] = 2
    options = {"retrieval_pictures": 2, "ways": 4, "grid_images": 3, "final_pictures": 2,
               "final_retrieval_pictures": 2, "final_features": False}  # fmt: skip
    callback = {"class_path": "v2flow.training.t2i_callbacks.TextToImageCallback", "init_args": options}
    config["trainer"]["callbacks"].append(callback)
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "e.yaml")]) == 0
    folder = next(tmp_path.rglob("metrics.json")).parent
    events = events_of(folder)
    (shown,) = events.Images("val/generated")
    assert shown.step == 2 and (shown.width, shown.height) == (3 * 16, 16)
    (text,) = events.Tensors("val/generated_captions/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert lines == [f"{number}. {caption}" for number, caption in enumerate(CAPTIONS[:3], 1)]
    assert (folder / "grids" / "step-000002.txt").read_text().splitlines() == CAPTIONS[:3]
    grid = load_image(folder / "grids" / "step-000002.png").mul(255).round().to(torch.uint8)
    assert torch.equal(grid[:, 2:66:4, 2:66:4], picture(shown)[:, :, :16])  # enlarged fourfold in a margin


# --- other loggers ----------------------------------------------------------------------------------------------


def test_a_csv_logger_by_one_option(shards: dict[str, str], tmp_path: Path) -> None:
    folder = two_steps(shards, tmp_path, "--trainer.logger=CSVLogger")
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = [float(row["val/psnr"]) for row in rows if row["val/psnr"]]
    (line,) = (folder / "validation.jsonl").read_text().splitlines()
    assert logged == [pytest.approx(json.loads(line)["psnr"], rel=1e-5)]
    assert (folder / "grids" / "step-000002.png").is_file() and (folder / "config.yaml").is_file()
    assert not list(tmp_path.rglob("events.out*"))


def recorded(run: Path, text: str) -> bool:
    """Whether a W&B run's record holds a text; it is written by another process, also after the run's end."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if any(text.encode() in record.read_bytes() for record in run.glob("*.wandb")):
            return True
        time.sleep(0.1)
    return False


def test_wandb_offline_by_options(
    shards: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of one project, each with a folder of its own."""
    import wandb

    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = ["--trainer.logger=WandbLogger", "--trainer.logger.init_args.offline=true"]
    words += ["--trainer.logger.init_args.project=toys"]
    folders = []
    for _ in range(2):
        folders.append(two_steps(shards, tmp_path, *words))
        wandb.finish()
    for folder in folders:
        assert folder.parent == tmp_path / "toys"
        assert (folder / "config.yaml").is_file() and (folder / "checkpoints" / "last.ckpt").is_file()
        (run,) = tmp_path.glob(f"wandb/offline-run-*-{folder.name}")
        names = sorted(path.name for path in (run / "files/media/images/val").iterdir())
        assert len(names) == 2 and names[0].startswith("codebook_usage_map_") and names[1].startswith("grid_")
        assert recorded(run, "val/token_entropy_histogram")


def test_wandb_has_captions_beneath_their_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(offline=True, save_dir=tmp_path)
    log_picture(
        Trainer(accelerator="cpu", logger=logger), "val/generated", usage_map(torch.ones(4)), CAPTIONS[:2]
    )
    wandb.finish()
    (run,) = tmp_path.glob("wandb/offline-run-*")
    assert recorded(run, "; ".join(CAPTIONS[:2]))


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="mlflow is installed")
def test_a_logger_whose_package_is_missing_is_one_line(
    shards: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(experiment(shards, tmp_path), tmp_path / "e.yaml")
    assert main(["fit", "--config", path, "--trainer.logger=MLFlowLogger"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("v2flow: error: ")]
    assert "mlflow" in line and "pip install" in line and "Expected a" not in line
