"""Averaged weights: the decay, what is averaged, copied or shared, and what checkpoints hold whatever happens."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from v2flow.errors import V2FlowError
from v2flow.training.ema import EMACallback
from v2flow.training.optimizer import OptimizerConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*resumed from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
STEPS = 6


class Model(LightningModule):
    """A trained layer, a statistic that every step changes, and frozen rows: a buffer and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("table", torch.randn(50, 3, generator=generator), persistent=False)
        self.layer = nn.Linear(3, 3)
        self.frozen = nn.Parameter(torch.randn(4, 3, generator=generator), requires_grad=False)
        self.register_buffer("count", torch.zeros(()))
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(3, 3, generator=generator))
            self.layer.bias.zero_()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        # Data keyed by the step: what a resume does to the order of a loader is not this file's subject.
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(self.global_step))
        self.count += 10
        return (self.layer(batch) - batch.roll(1, dims=1)).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.layer.parameters(), lr=0.1)


class Recorder(Callback):
    """The trained weights after every step, and those that validation sees."""

    def __init__(self) -> None:
        self.trained: list[Tensor] = []
        self.validated: list[Tensor] = []
        self.after_validation: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Model, *_: Any) -> None:
        self.trained.append(pl_module.layer.weight.detach().clone())

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Model, *_: Any) -> None:
        self.validated.append(pl_module.layer.weight.detach().clone())

    def on_validation_end(self, trainer: Trainer, pl_module: Model) -> None:
        self.after_validation.append(pl_module.layer.weight.detach().clone())


class InValidation(Callback):
    """Does something in the first batch of the validation after `step` steps."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Model, batch: Any, batch_idx: int, *_: Any
    ):
        if trainer.global_step == self.step and batch_idx == 0:
            self.action(trainer)


def fit(
    module: Model, folder: Path, *callbacks: Callback, steps: int = STEPS, resume: Path | None = None
) -> Trainer:
    data = torch.zeros(STEPS, 4, 3)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, callbacks=[*callbacks],
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, val_check_interval=2,
        num_sanity_val_steps=0,
    )  # fmt: skip
    train, val = DataLoader(data, batch_size=None), DataLoader(data[:2], batch_size=None)
    trainer.fit(module, train, val, ckpt_path=None if resume is None else str(resume), weights_only=True)
    return trainer


def averages(trained: list[Tensor], limit: float) -> list[Tensor]:
    """The average after every step: the first weights, then a plain recursion."""
    found = [trained[0]]
    for updates, weight in enumerate(trained[1:], start=1):
        decay = min(limit, (1 + updates) / (10 + updates))
        found.append(decay * found[-1] + (1 - decay) * weight)
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Timed(Model):
    """A model whose own clock says how long the run is, as v2flow's modules do."""

    def __init__(self, total_steps: int) -> None:
        super().__init__()
        self.optimizer_config = OptimizerConfig(total_steps=total_steps, warmup_steps=0)


def test_the_decay_grows_to_its_limit() -> None:
    callback = EMACallback(decay=0.5)
    assert [callback.decay_after(n) for n in (0, 2, 7, 8, 10**6)] == [0.1, 0.25, 8 / 17, 0.5, 0.5]


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(V2FlowError, match="option decay of EMACallback"):
        EMACallback(decay=decay)


@pytest.mark.parametrize(
    ("total", "decay", "half_life"), [(200, 0.9999, 10.0), (200, 0.5, 1.0), (40, 0.99, 2.0)]
)
def test_the_half_life_is_at_most_a_twentieth_of_the_run(
    tmp_path: Path, total: int, decay: float, half_life: float
) -> None:
    """The module's clock counts, not where this trainer stops: a run in two parts averages like one in a piece."""
    callback = EMACallback(decay=decay)
    fit(Timed(total), tmp_path, callback, steps=2)
    assert callback.decay_after(10**6) ** half_life == pytest.approx(0.5)


def test_without_a_clock_the_trainers_steps_count(tmp_path: Path) -> None:
    callback = EMACallback(decay=0.9999)
    fit(Model(), tmp_path, callback, steps=5)
    assert callback.decay_after(10**6) ** 0.25 == pytest.approx(0.5)


def test_average_is_a_plain_recursion_and_validation_sees_it(tmp_path: Path) -> None:
    recorder = Recorder()
    module = Timed(10**6)
    fit(module, tmp_path, EMACallback(decay=0.3), recorder)
    expected = averages(recorder.trained, 0.3)
    torch.testing.assert_close(recorder.validated[::2], expected[1::2])
    # The raw weights are back afterwards: the training goes on from them.
    assert [torch.equal(a, b) for a, b in zip(recorder.after_validation, recorder.trained[1::2], strict=True)] == [
        True, True, True,
    ]  # fmt: skip
    torch.testing.assert_close(module.layer.weight.detach(), expected[-1])
    assert not torch.allclose(expected[-1], recorder.trained[-1])


def test_averaging_does_not_change_the_training(tmp_path: Path) -> None:
    with_average, without = Recorder(), Recorder()
    fit(Model(), tmp_path, EMACallback(), with_average)
    fit(Model(), tmp_path, without)
    assert torch.equal(torch.stack(with_average.trained), torch.stack(without.trained))


class SaveAfter(Callback):
    """Saves a checkpoint after `step` steps."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_holds_the_average_and_the_raw_weights(tmp_path: Path) -> None:
    recorder, path = Recorder(), tmp_path / "five.ckpt"
    fit(Timed(10**6), tmp_path, EMACallback(decay=0.3), recorder, SaveAfter(5, path))
    checkpoint = torch.load(path, weights_only=True)
    average, raw = checkpoint["state_dict"], checkpoint["current_model_state"]
    torch.testing.assert_close(average["layer.weight"], averages(recorder.trained, 0.3)[4])
    assert torch.equal(raw["layer.weight"], recorder.trained[4])
    # A statistic is copied: its average over five steps would be another number.
    assert average["count"] == raw["count"] == 50
    assert "table" not in average and "table" not in raw


def test_a_checkpoint_saved_after_the_end_still_holds_both(tmp_path: Path) -> None:
    """By then the average stands in the module; taken for raw, it would be what a longer training resumes from."""
    recorder, path = Recorder(), tmp_path / "end.ckpt"
    module = Timed(10**6)
    trainer = fit(module, tmp_path, EMACallback(decay=0.3), recorder)
    trainer.validate(module, DataLoader(torch.zeros(1, 4, 3), batch_size=None), verbose=False)
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    expected = averages(recorder.trained, 0.3)[-1]
    torch.testing.assert_close(recorder.validated[-1], expected)
    torch.testing.assert_close(checkpoint["state_dict"]["layer.weight"], expected)
    assert torch.equal(checkpoint["current_model_state"]["layer.weight"], recorder.trained[-1])


def test_model_checkpoints_after_validation_hold_both(tmp_path: Path) -> None:
    """Lightning saves them when validation has just ended, and the last one at the end of the training."""
    recorder, saver = Recorder(), ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_last=True)
    fit(Timed(10**6), tmp_path, EMACallback(decay=0.3), recorder, saver)
    expected = averages(recorder.trained, 0.3)
    paths = {"step=2.ckpt": 2, "step=4.ckpt": 4, "step=6.ckpt": 6, "last.ckpt": 6}
    assert {path.name for path in tmp_path.glob("*.ckpt")} == paths.keys()
    for name, step in paths.items():
        checkpoint = torch.load(tmp_path / name, weights_only=True)
        torch.testing.assert_close(checkpoint["state_dict"]["layer.weight"], expected[step - 1])
        assert torch.equal(checkpoint["current_model_state"]["layer.weight"], recorder.trained[step - 1])


@pytest.mark.parametrize("before", ["trained", "interrupted", "nothing"])
def test_a_checkpoint_loaded_to_be_scored_gives_its_average(tmp_path: Path, before: str) -> None:
    """By a callback that still holds both sets of weights of a training, as by a new one."""
    path, recorder = tmp_path / "three.ckpt", Recorder()
    module, callback = Timed(10**6), EMACallback(decay=0.3)
    fit(module, tmp_path, callback, recorder, SaveAfter(3, path))
    expected, raw = averages(recorder.trained, 0.3)[2], recorder.trained[2]
    if before == "interrupted":
        with pytest.raises(RuntimeError, match="disk is full"):
            fit(module, tmp_path, callback, InValidation(2, fail))
    if before == "nothing":
        module, callback = Timed(10**6), EMACallback(decay=0.3)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, callbacks=[callback, recorder],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    data = DataLoader(torch.zeros(1, 4, 3), batch_size=None)
    trainer.validate(module, data, ckpt_path=str(path), verbose=False, weights_only=True)
    torch.testing.assert_close(recorder.validated[-1], expected)
    torch.testing.assert_close(module.layer.weight.detach(), expected)
    if before != "nothing":
        trainer.save_checkpoint(tmp_path / "again.ckpt")
        again = torch.load(tmp_path / "again.ckpt", weights_only=True)
        torch.testing.assert_close(again["state_dict"]["layer.weight"], expected)
        assert torch.equal(again["current_model_state"]["layer.weight"], raw)


def test_what_is_frozen_is_shared_and_keeps_its_place(tmp_path: Path) -> None:
    module, callback = Model(), EMACallback()
    names = [name for name, _ in module.named_parameters()], [name for name, _ in module.named_buffers()]
    table = module.table.clone()
    fit(module, tmp_path, callback)
    copy = callback._average_model.module
    assert copy.table.data_ptr() == module.table.data_ptr()
    assert copy.frozen.data_ptr() == module.frozen.data_ptr()
    assert copy.layer.weight.data_ptr() != module.layer.weight.data_ptr()
    assert copy.count.data_ptr() != module.count.data_ptr()
    assert torch.equal(module.table, table)
    for each in (module, copy):
        assert [n for n, _ in each.named_parameters()] == names[0]
        assert [n for n, _ in each.named_buffers()] == names[1]


def test_what_is_frozen_is_not_even_copied_for_a_moment(tmp_path: Path) -> None:
    """A copy of LLaMA's rows or of an autoencoder would decide whether a run fits in memory."""
    copied: list[str] = []

    class Watched(Tensor):
        def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
            copied.append("table")
            return self

    module = Model()
    module.table = module.table.as_subclass(Watched)
    callback = EMACallback()
    callback.setup(
        Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False), module, "fit"
    )
    assert copied == []
    assert callback._average_model.module.table is module.table


def test_saving_inside_validation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "inside.ckpt"
    with pytest.raises(V2FlowError, match="inside validation"):
        fit(Model(), tmp_path, EMACallback(), InValidation(2, lambda trainer: trainer.save_checkpoint(path)))
    assert not path.exists()


def fail(trainer: Trainer) -> None:
    raise RuntimeError("the disk is full")


def terminate(trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("action", "raised"), [(fail, RuntimeError), (terminate, SIGTERMException)], ids=["exception", "SIGTERM"]
)
def test_stopped_inside_validation_and_resumed(tmp_path: Path, action: Any, raised: type) -> None:
    """What is saved on the way out is the raw weights as raw; the resumed training is bit-equal to one in a piece."""
    whole = Recorder()
    uninterrupted = fit(Timed(STEPS), tmp_path, EMACallback(decay=0.3), whole)
    stopped = Recorder()
    with pytest.raises(raised):
        fit(Timed(STEPS), tmp_path, EMACallback(decay=0.3), stopped, InValidation(4, action),
            OnExceptionCheckpoint(tmp_path))  # fmt: skip
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert torch.equal(saved["current_model_state"]["layer.weight"], whole.trained[3])
    torch.testing.assert_close(saved["state_dict"]["layer.weight"], whole.validated[2])

    resumed = Recorder()
    again = fit(
        Timed(STEPS), tmp_path, EMACallback(decay=0.3), resumed, resume=tmp_path / "on_exception.ckpt"
    )
    assert torch.equal(torch.stack(resumed.trained), torch.stack(whole.trained[4:]))
    for trainer, name in ((uninterrupted, "a.ckpt"), (again, "b.ckpt")):
        trainer.save_checkpoint(tmp_path / name)
    a, b = (torch.load(tmp_path / name, weights_only=True) for name in ("a.ckpt", "b.ckpt"))
    assert same(a["state_dict"], b["state_dict"]) and same(a["current_model_state"], b["current_model_state"])
    assert same(a["averaging_state"], b["averaging_state"])
