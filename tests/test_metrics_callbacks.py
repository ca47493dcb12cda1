"""The reconstruction callback under Lightning: logging, grids, final files, averaged weights, two ranks."""

import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from loopback import free_port
from metric_toys import MODES, ToyLoader, ToyModule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from v2flow.errors import V2FlowError
from v2flow.evaluate import evaluate_model
from v2flow.images import load_image
from v2flow.training.logged_pictures import usage_map
from v2flow.training.metric_callbacks import ReconstructionCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers",
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning on a newer torch
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def fit(tmp_path: Path, callbacks: list[Callback], **options: Any) -> tuple[Trainer, ToyModule]:
    """Two steps of training, a validation after each, on 10 pictures in batches of 4."""
    seed_everything(0, verbose=False)
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "limit_train_batches": 1,
        "logger": CSVLogger(tmp_path),
    } | options
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip
    module = ToyModule()
    trainer.fit(module, ToyLoader(8, 4), ToyLoader(10, 4))
    return trainer, module


def metrics_file(folder: str | Path | None) -> dict[str, Any]:
    assert folder is not None
    return json.loads((Path(folder) / "metrics.json").read_text())


def scored(module: ToyModule, gain: float) -> dict[str, Any]:
    """The figures of the module with this gain, by `evaluate_model`."""
    model = deepcopy(module.model)
    model.gain.data.fill_(gain)
    return evaluate_model(model, ToyLoader(10, 4), MODES, features=False)


def test_logged_and_written_figures_are_those_of_evaluate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best, last = ModelCheckpoint(monitor="val/psnr", mode="max"), ModelCheckpoint(filename="last")
    trainer, module = fit(tmp_path, [ReconstructionCallback(grid_images=5), best, last])
    assert module.model.gain.item() == pytest.approx(1.2)
    expected = scored(module, module.model.gain.item())
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    for mode, figures in expected["modes"].items():
        for name, value in figures.items():
            assert logged[f"val/{mode}/{name}"] == pytest.approx(value, rel=1e-6)
    assert logged["val/psnr"] == logged["val/mean/psnr"]
    assert logged["val/codebook_usage"] == pytest.approx(expected["codebook"]["usage"])
    assert logged["val/codebook_perplexity"] == pytest.approx(expected["codebook"]["perplexity"])
    assert not any("kid" in name for name in logged)
    report = metrics_file(trainer.log_dir)
    assert report["weights"].keys() == {"raw"} and report["step"] == 2
    for mode, figures in expected["modes"].items():
        found = report["weights"]["raw"]["modes"][mode]
        assert {name: found[name] for name in figures} == figures
        assert found["kid-efficientnet-lite0"] > 0
    assert report["protocol"]["split"] == "val" and report["protocol"]["images"] == 10
    assert Path(report["checkpoint"]).name == "last.ckpt"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("v2flow: ")]
    # PSNR falls from step 1 to step 2, so best and last are two files.
    assert f"best checkpoint {best.best_model_path}, last checkpoint {last.best_model_path}" in line
    for path in (best.best_model_path, last.best_model_path, f"{trainer.log_dir}/metrics.json"):
        assert path in line and Path(path).is_file()
    assert "step=1" in best.best_model_path and Path(last.best_model_path).name == "last.ckpt"
    assert f"grid {trainer.log_dir}/grid.png" in line
    folder = Path(str(trainer.log_dir))
    assert sorted(path.name for path in (folder / "grids").iterdir()) == [
        "step-000001.png",
        "step-000002.png",
    ]
    assert load_image(folder / "grid.png").shape == (3, 3 * 68, 5 * 68)  # three rows of five pictures


def test_a_checkpoint_of_earlier_weights_is_not_named_as_the_one_scored(tmp_path: Path) -> None:
    """Steps end between validations: the checkpoint is of step 2, the figures are of step 3."""
    checkpoint = ModelCheckpoint(monitor="val/psnr", mode="max")
    callback = ReconstructionCallback(final_features=False, grid_images=0)
    trainer, _ = fit(tmp_path, [callback, checkpoint], limit_train_batches=2, max_steps=3)
    report = metrics_file(trainer.log_dir)
    assert report["step"] == 3 and report["checkpoint"] == "" and Path(checkpoint.best_model_path).is_file()


@pytest.mark.parametrize("averaging_first", [True, False])
def test_averaged_weights_are_scored_wherever_their_callback_stands(
    tmp_path: Path, averaging_first: bool
) -> None:
    callbacks: list[Callback] = [
        ReconstructionCallback(final_features=False, grid_images=0),
        EMAWeightAveraging(decay=0.5),
    ]
    trainer, module = fit(tmp_path, callbacks[::-1] if averaging_first else callbacks)
    average = (1.1 + 1.2) / 2
    expected = scored(module, average)["modes"]["mean"]["psnr"]
    assert abs(expected - scored(module, 1.2)["modes"]["mean"]["psnr"]) > 0.05
    report = metrics_file(trainer.log_dir)
    assert report["weights"].keys() == {"ema"} and report["protocol"]["weights"] == ["ema"]
    assert report["weights"]["ema"]["modes"]["mean"]["psnr"] == pytest.approx(expected, abs=1e-3)
    assert trainer.callback_metrics["val/psnr"].item() == pytest.approx(expected, abs=1e-3)
    assert module.model.gain.item() == pytest.approx(average)


def test_grid_and_scalars_reach_tensorboard(tmp_path: Path) -> None:
    callback = ReconstructionCallback(modes=["sampled"], features=True, final_features=False, grid_images=3)
    trainer, _ = fit(tmp_path, [callback], logger=TensorBoardLogger(tmp_path), max_epochs=1)
    events = EventAccumulator(str(trainer.log_dir), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"val/grid", "val/codebook_usage_map"}
    assert events.Tags()["histograms"] == []  # a tokenizer without a vocabulary
    image = events.Images("val/grid")[0]
    assert (image.width, image.height) == (3 * 16, 2 * 16)
    scalars = events.Tags()["scalars"]
    assert {
        "val/psnr",
        "val/sampled/psnr",
        "val/sampled/ssim",
        "val/sampled/kid-efficientnet-lite0_se",
    } <= set(scalars)
    assert "val/mean/psnr" not in scalars
    assert metrics_file(trainer.log_dir)["weights"]["raw"]["modes"].keys() == {"mean", "sampled"}


def test_without_logger_files_go_to_the_root_and_limits_hold(tmp_path: Path) -> None:
    callback = ReconstructionCallback(final_features=False)
    fit(tmp_path, [callback], logger=False, enable_checkpointing=False, limit_val_batches=2)
    report = metrics_file(tmp_path)
    assert report["weights"]["raw"]["images"] == 8 and report["checkpoint"] == ""
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.parametrize(
    "options", [{"fast_dev_run": True}, {"limit_val_batches": 0}], ids=["fast_dev_run", "no validation"]
)
def test_dry_runs_leave_no_files(
    tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, [ReconstructionCallback()], **({"logger": False, "enable_checkpointing": False} | options))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".png")]
    assert "metrics" not in capsys.readouterr().out


class _StopBeforeTraining(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        assert trainer.callback_metrics == {}
        raise KeyError("sanity checking is over")


def test_sanity_checking_logs_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="sanity checking is over"):
        fit(tmp_path, [ReconstructionCallback(), _StopBeforeTraining()])
    assert not list(tmp_path.rglob("*.png"))


def test_bad_options_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(V2FlowError, match="unknown decode mode 'best'"):
        fit(tmp_path, [ReconstructionCallback(modes=["best"])])
    with pytest.raises(
        V2FlowError, match="option floors: expected one process and a data module with training shards"
    ):
        fit(tmp_path, [ReconstructionCallback(floors=True)])
    with pytest.raises(V2FlowError, match="option grid_images"):
        ReconstructionCallback(grid_images=-1)


def _fit_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
        "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
    }  # fmt: skip
    callback = ReconstructionCallback(final_features=True, grid_images=2)
    logger = TensorBoardLogger(folder)
    trainer, _ = fit(Path(folder), [callback], devices=2, strategy="ddp", max_epochs=1, logger=logger)
    Path(folder, f"psnr-{rank}").write_text(str(trainer.callback_metrics["val/psnr"].item()))


def test_two_ranks_give_the_figures_of_one(tmp_path: Path) -> None:
    """10 pictures in batches of 4 on two ranks: the last batch of rank 1 is all padding."""
    mp.spawn(_fit_rank, (free_port(), str(tmp_path)), nprocs=2)
    (file,) = tmp_path.rglob("metrics.json")
    two = json.loads(file.read_text())
    model = ToyModule().model
    model.gain.data.fill_(1.1)
    one = evaluate_model(model, ToyLoader(10, 4), MODES)
    found = two["weights"]["raw"]
    assert found["images"] == 10 and two["protocol"]["ranks"] == 2
    assert found["codebook"] == pytest.approx(one["codebook"])
    for mode, figures in one["modes"].items():
        assert found["modes"][mode] == pytest.approx(figures, rel=1e-4)
    for key in ("keys_sha256", "pixels_sha256"):
        assert two["protocol"][key] == one["protocol"][key]
    events = EventAccumulator(str(file.parent))
    events.Reload()
    (shown,) = events.Images("val/codebook_usage_map")
    counts = model.encode(ToyLoader(10, 4).images).flatten().bincount(minlength=64)
    (tmp_path / "map.png").write_bytes(shown.encoded_image_string)
    assert torch.equal((load_image(tmp_path / "map.png") * 255).round().to(torch.uint8), usage_map(counts))
    logged = [float((tmp_path / f"psnr-{rank}").read_text()) for rank in range(2)]
    assert logged[0] == logged[1] == pytest.approx(one["modes"]["mean"]["psnr"], rel=1e-6)
