"""The data module under a real Lightning trainer: epochs, resuming, limits, overfitting, two processes, bad options."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from data_toys import number_of, numbered_shards
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from v2flow.errors import V2FlowError
from v2flow.training.data_module import ShardDataModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """43 training samples (10 batches of 4 and a rest) and 11 for validation."""
    train = numbered_shards(tmp_path / "train", [30, 13])
    held_out = numbered_shards(tmp_path / "val", [11])
    return {"image_size": 8, "train": train, "val": held_out, "batch_size": 4, "flip": True, "seed": 2}


class Recorder(LightningModule):
    """Learns nothing, and notes what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[int, list[int]]] = []
        self.validated: list[list[int]] = []
        self.fail_at: int | None = None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if len(self.trained) == self.fail_at:
            raise RuntimeError("interrupted in the middle of a step")
        self.trained.append((batch_idx, [number_of(image) for image in batch["image"]]))
        return self.weight * batch["image"].mean()

    def on_validation_epoch_start(self) -> None:
        self.validated.append([])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated[-1] += [number_of(i) for i, v in zip(batch["image"], batch["valid"], strict=True) if v]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, num_sanity_val_steps=0, **(quiet | options)
    )


def fit(folder: Path, data: dict[str, Any], ckpt: Path | None = None, **options: Any) -> Recorder:
    options = {"enable_checkpointing": "callbacks" in options, "limit_val_batches": 0} | options
    module = Recorder()
    trainer(folder, **options).fit(
        module, datamodule=ShardDataModule(**data), ckpt_path=ckpt, weights_only=True
    )
    return module


def orders(data: dict[str, Any], epochs: int) -> list[list[int]]:
    """Batches of the first epochs, straight from the loader."""
    loader = ShardDataModule(**data).train_dataloader()
    return [[number_of(image) for image in batch["image"]] for _ in range(epochs) for batch in loader]


def batches(module: Recorder) -> list[list[int]]:
    return [numbers for _, numbers in module.trained]


def test_epochs_follow_the_order_and_validation_is_held_out(tmp_path: Path, data: dict[str, Any]) -> None:
    module = fit(tmp_path, data, max_epochs=3, limit_val_batches=1.0)
    assert batches(module) == orders(data, 3)
    assert [index for index, _ in module.trained] == list(range(10)) * 3
    assert module.validated == [list(range(11))] * 3


@pytest.mark.parametrize(("saved", "workers"), [(3, 3), (10, 0), (14, 0), (14, 1)])
def test_resume_at_any_step_is_as_if_never_interrupted(
    tmp_path: Path, data: dict[str, Any], workers: int, saved: int
) -> None:
    data = data | {"num_workers": workers}
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=saved, save_top_k=-1)
    first = fit(tmp_path, data, max_steps=saved, max_epochs=-1, callbacks=[save])
    path = tmp_path / f"step={saved}.ckpt"
    (state,) = torch.load(path, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    position = {"seed": 2, "epoch": (saved - 1) // 10, "samples": 4 * ((saved - 1) % 10 + 1)}
    assert state == position | ShardDataModule(**data).train_batches().facts and state["total"] == 43
    resumed = fit(tmp_path, data, ckpt=path, max_steps=25, max_epochs=-1)
    assert batches(first) + batches(resumed) == orders(data, 3)[:25]
    indices = [index for index, _ in first.trained + resumed.trained]
    assert indices == [i % 10 for i in range(25)]


@pytest.mark.parametrize("limit", [1.0, 7])
@pytest.mark.parametrize("end_of", ["train_epoch", "validation"])
def test_resume_from_the_end_of_an_epoch(
    tmp_path: Path, data: dict[str, Any], limit: int | float, end_of: str
) -> None:
    """Also where the trainer's epochs are shorter than the loader's."""
    save = ModelCheckpoint(
        tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=end_of == "train_epoch"
    )
    options: dict[str, Any] = {"limit_train_batches": limit, "limit_val_batches": 2}
    whole = fit(tmp_path / "a", data, max_epochs=4, **options)
    fit(tmp_path, data, max_epochs=2, callbacks=[save], **options)
    resumed = fit(tmp_path, data, ckpt=tmp_path / "epoch=1.ckpt", max_epochs=4, **options)
    steps = 10 if limit == 1.0 else 7
    assert len(whole.trained) == 4 * steps and resumed.trained == whole.trained[2 * steps :]


def test_a_batch_lost_to_an_interruption_is_trained_on_after_the_resume(
    tmp_path: Path, data: dict[str, Any]
) -> None:
    module = Recorder()
    module.fail_at = 6
    save = ModelCheckpoint(tmp_path, save_on_exception=True, filename="x", every_n_train_steps=100)
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(tmp_path, callbacks=[save], max_epochs=2, limit_val_batches=0).fit(
            module, datamodule=ShardDataModule(**data | {"num_workers": 1})
        )
    (path,) = tmp_path.glob("*.ckpt")
    resumed = fit(tmp_path, data, ckpt=path, max_epochs=2)
    assert batches(module) + batches(resumed) == orders(data, 2)


@pytest.mark.parametrize("size", [2, 8])
def test_resume_with_another_batch_size_sees_the_same_samples(
    tmp_path: Path, data: dict[str, Any], size: int
) -> None:
    save = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=6)
    first = fit(tmp_path, data, max_steps=6, max_epochs=-1, callbacks=[save])
    resumed = fit(tmp_path, data | {"batch_size": size}, ckpt=tmp_path / "x.ckpt", max_epochs=1)
    samples = sum(batches(first) + batches(resumed), [])
    rest = (43 - 24) // size
    assert samples == sum(orders(data | {"batch_size": 1}, 1), [])[: 24 + rest * size]
    assert resumed.trained[-1][0] == 43 // size - 1, "the trainer counts in the new batches"


def test_resume_validates_everything_once_more(tmp_path: Path, data: dict[str, Any]) -> None:
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    options: dict[str, Any] = {"val_check_interval": 5, "limit_val_batches": 1.0, "max_epochs": 2}
    whole = fit(tmp_path / "a", data, **options)
    fit(tmp_path, data, callbacks=[save], **options)
    resumed = fit(tmp_path, data, ckpt=tmp_path / "step=15.ckpt", **options)
    assert whole.validated == [list(range(11))] * 4
    assert resumed.validated and all(numbers == list(range(11)) for numbers in resumed.validated)
    assert resumed.trained == whole.trained[15:]


def test_fast_dev_run_and_limits(tmp_path: Path, data: dict[str, Any]) -> None:
    module = fit(tmp_path, data, fast_dev_run=2, limit_val_batches=1.0)
    assert batches(module) == orders(data, 1)[:2] and module.validated == [list(range(8))]
    module = fit(tmp_path, data, max_epochs=2, limit_train_batches=0.3, limit_val_batches=1)
    whole = orders(data, 2)
    assert batches(module) == whole[:3] + whole[10:13] and module.validated == [list(range(4))] * 2


@pytest.mark.parametrize("overfit", [1, 3])
def test_overfit_batches_repeats_the_same_batches(tmp_path: Path, data: dict[str, Any], overfit: int) -> None:
    data = data | {"crop": "random", "flip": True}
    module = fit(tmp_path, data, max_epochs=4, overfit_batches=overfit)
    assert batches(module) == orders(data, 1)[:overfit] * 4


def test_without_validation_shards_there_is_no_validation(tmp_path: Path, data: dict[str, Any]) -> None:
    module = fit(tmp_path, data | {"val": None}, max_epochs=1, limit_val_batches=1.0)
    assert len(module.trained) == 10 and module.validated == []


def test_workers_end_with_the_fit(tmp_path: Path, data: dict[str, Any]) -> None:
    import multiprocessing

    fit(tmp_path, data | {"num_workers": 2}, max_steps=3, max_epochs=-1)
    assert multiprocessing.active_children() == []


def refused(data: dict[str, Any], stage: str = "fit") -> str:
    with pytest.raises(V2FlowError) as caught:
        module = ShardDataModule(**data)
        module.setup(stage)
        if stage == "fit":
            module.train_dataloader()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_options_name_the_option(tmp_path: Path, data: dict[str, Any]) -> None:
    assert "data.batch_size: expected at least 1, found 0" in refused(data | {"batch_size": 0})
    assert "data.val_limit" in refused(data | {"val_limit": 0})
    assert "data.crop: expected center or random, found 'top'" in refused(data | {"crop": "top"})
    assert "data.cache_decoded" in refused(data | {"cache_decoded": True, "crop": "random"})
    assert "nowhere/a.tar: no such shard" in refused(data | {"train": "nowhere/a.tar"})
    assert "data.train: no shards are named, but `fit`" in refused(data | {"train": None})
    assert "data.test: no shards are named, but `test`" in refused(data, "test")
    assert "43 samples are fewer than one batch of 64" in refused(data | {"batch_size": 64})
    shared = [str(tmp_path / "val" / "s-000000.tar"), str(tmp_path / "val" / ".." / "train" / "s-000000.tar")]
    assert "data.val" in refused(data | {"val": shared}) and "also a training shard" in refused(
        data | {"val": shared}
    )


def test_missing_captions_are_found_before_training(tmp_path: Path, data: dict[str, Any]) -> None:
    from data_toys import numbered_picture, write_tar

    path = write_tar(
        tmp_path / "a.tar", [("a.png", numbered_picture(1)), ("a.txt", b"a"), ("b.png", numbered_picture(2))]
    )
    message = refused(data | {"train": path, "captions": True})
    assert message.startswith(f"{path}, sample 'b': no caption")
    ShardDataModule(**data | {"train": path}).setup("fit")
    ShardDataModule(**data | {"captions": True}).setup("fit")


def test_the_fingerprint_names_the_pictures(tmp_path: Path, data: dict[str, Any]) -> None:
    def fingerprint(**changes: Any) -> str:
        return ShardDataModule(**data | changes).eval_fingerprint("val")

    base = fingerprint()
    assert base == fingerprint(batch_size=3, num_workers=1, seed=9) == fingerprint(val_limit=11)
    others = {fingerprint(val_limit=10), fingerprint(image_size=16)}
    others.add(fingerprint(val=numbered_shards(tmp_path / "other", [12])))
    assert len(others) == 3 and base not in others and len(base) == 64


WORKER = """
import json, sys
import torch.distributed as dist
from v2flow.training.data_module import ShardDataModule

rank, ranks, store, options = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
module = ShardDataModule(**options)
module.setup("fit")
loader = module.train_dataloader()
number = lambda image: round(float(image[0, 0, 0]) * 255)
steps = []
for epoch in range(2):
    for batch in loader:
        dist.barrier()  # a rank with fewer batches would hang here
        steps.append([number(image) for image in batch["image"]])
valid = []
for batch in module.val_dataloader():
    dist.barrier()
    valid += [number(i) for i, v in zip(batch["image"], batch["valid"]) if v]
print(json.dumps({"train": steps, "val": valid, "state": loader.state_dict()}))
dist.destroy_process_group()
"""


def test_two_processes_split_batches_and_take_equal_steps(tmp_path: Path, data: dict[str, Any]) -> None:
    options = json.dumps(data | {"batch_size": 3, "num_workers": 1, "eval_batch_size": 4})
    command = [sys.executable, "-c", WORKER]
    running = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path / "store"), options], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    results = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in running]
    merged = [a + b for a, b in zip(results[0]["train"], results[1]["train"], strict=True)]
    assert merged == orders(data | {"batch_size": 6}, 2)
    assert sorted(results[0]["val"] + results[1]["val"]) == list(range(11))
    assert results[0]["state"] == results[1]["state"]
