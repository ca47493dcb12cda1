"""The real parts together: shards, tokenizer, averaging, callback and `evaluate_checkpoint` on the callback's data."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from core_toys import small_config
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from v2flow.errors import V2FlowError
from v2flow.evaluate import evaluate_checkpoint
from v2flow.training.data_module import ShardDataModule
from v2flow.training.ema import EMACallback
from v2flow.training.metric_callbacks import ReconstructionCallback
from v2flow.training.optimizer import OptimizerConfig
from v2flow.training.tokenizer_module import TokenizerModule

FIGURES = ("psnr", "psnr_pooled", "ssim", "kid-efficientnet-lite0", "kid-efficientnet-lite0_se")

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def copy_samples(source: Path, target: Path, count: int) -> str:
    """The first samples of a shard as a shard of their own."""
    with tarfile.open(source) as tar, tarfile.open(target, "w") as out:
        for member in tar.getmembers()[: 2 * count]:
            out.addfile(member, tar.extractfile(member))
    return str(target)


@pytest.fixture(scope="module")
def shards(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """24 training and 10 validation pictures of CIFAR-10."""
    folder = tmp_path_factory.mktemp("cifar10")
    return {
        "train": copy_samples(shared_data / "cifar10" / "train-000000.tar", folder / "train-000000.tar", 24),
        "val": copy_samples(shared_data / "cifar10" / "test-000000.tar", folder / "val-000000.tar", 10),
    }


@pytest.fixture(scope="module")
def run(shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder of a run of three steps, and its metrics.json."""
    folder = tmp_path_factory.mktemp("run")
    module = TokenizerModule(small_config(), OptimizerConfig(lr=0.01, total_steps=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("V2FLOW_CACHE", str(folder / "cache"))
        trainer = Trainer(
            max_steps=3, accelerator="cpu", devices=1, logger=False, default_root_dir=folder,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[
                ReconstructionCallback(floors=True, grid_images=4),
                EMACallback(decay=0.9),
                ModelCheckpoint(folder, filename="last"),
            ],
        )  # fmt: skip
        data = ShardDataModule(16, **shards, batch_size=8, eval_batch_size=4)
        trainer.fit(module, datamodule=data)
    return folder, json.loads((folder / "metrics.json").read_text())


def test_shards_that_are_not_there_are_told_before_anything_is_scored(
    run: tuple[Path, dict[str, Any]], shards: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("v2flow.evaluate.evaluate_model", lambda *_, **__: pytest.fail("scored first"))
    with pytest.raises(V2FlowError, match="nowhere"):
        evaluate_checkpoint(run[0] / "last.ckpt", shards["val"], floors_train="nowhere-{0..1}.tar")


def test_evaluate_gives_the_figures_of_the_callback(
    run: tuple[Path, dict[str, Any]], shards: dict[str, str], tmp_path: Path
) -> None:
    folder, report = run
    found = evaluate_checkpoint(
        folder / "last.ckpt",
        shards["val"],
        batch_size=4,
        floors_train=[shards["train"]],
        json_path=tmp_path / "out" / "evaluation.json",
    )
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == found
    assert found["weights"].keys() == {"ema", "raw"} and report["weights"].keys() == {"ema"}
    assert found["model"] == report["model"] == "V2FlowTokenizer" and found["step"] == report["step"] == 3
    callback, evaluated = report["weights"]["ema"], found["weights"]["ema"]
    assert callback["images"] == evaluated["images"] == 10
    assert callback["codebook"] == evaluated["codebook"]
    for mode in ("one_step", "sampled"):
        for name in FIGURES:
            assert callback["modes"][mode][name] == pytest.approx(evaluated["modes"][mode][name], rel=1e-6), (
                name
            )
    for row in ("mean_image", "nearest_training_picture"):
        assert report["floors"][row] == pytest.approx(found["floors"][row], rel=1e-6)
        assert 5 < found["floors"][row]["psnr"] < 30
    for name in ("keys_sha256", "pixels_sha256", "batch_size", "seed", "decode_modes"):
        assert report["protocol"][name] == found["protocol"][name]
    assert report["checkpoint"] == str(folder / "last.ckpt")
    # Raw and averaged weights differ, or equal figures would show nothing.
    assert found["weights"]["raw"]["modes"] != evaluated["modes"]


def test_limit_modes_and_folds(run: tuple[Path, dict[str, Any]], shards: dict[str, str]) -> None:
    folder, _ = run
    found = evaluate_checkpoint(
        folder / "last.ckpt", [shards["val"]], weights=["raw"], limit=7, modes=["sampled"], features=False
    )
    assert found["weights"]["raw"]["images"] == 7 and found["weights"]["raw"]["modes"].keys() == {"sampled"}
    assert (found["protocol"]["split"], found["protocol"]["limit"]) == ("val", 7)
    with pytest.raises(V2FlowError, match="unknown decode mode 'sharpest'"):
        evaluate_checkpoint(folder / "last.ckpt", shards["val"], modes=["sharpest"])


def test_equal_weights_are_scored_once(shards: dict[str, str], tmp_path: Path) -> None:
    """Trained without averaging, raw and averaged weights are one."""
    module = TokenizerModule(small_config(), OptimizerConfig(total_steps=1))
    trainer = Trainer(
        max_steps=1, accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=ShardDataModule(16, train=shards["train"], batch_size=8))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    found = evaluate_checkpoint(tmp_path / "plain.ckpt", shards["val"], features=False)
    assert found["weights"]["ema"] == found["weights"]["raw"]
    assert found["protocol"]["weights"] == ["ema", "raw"]
