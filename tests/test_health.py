"""Numerical health: steps that are not finite leave no trace, and what goes wrong is named."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from v2flow.config import VisualVocabularyConfig
from v2flow.errors import V2FlowError
from v2flow.training.ema import EMACallback
from v2flow.training.health import HealthCallback
from v2flow.training.optimizer import OptimizerConfig
from v2flow.training.resume import ExactResumeCallback
from v2flow.visual_vocabulary import VisualVocabulary

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*resumed from a checkpoint that ended before the epoch ended"),
]
BATCHES = 12


class Model(LightningModule):
    """A layer and a running sum of its inputs. Batches of these numbers have a loss, a gradient or both that are not
    finite; only `loss` spoils the sum."""

    def __init__(
        self, loss: tuple[int, ...] = (), gradient: tuple[int, ...] = (), value: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.loss, self.gradient, self.value = loss, gradient, value
        self.optimizer_config = OptimizerConfig(total_steps=10**6)  # the clock of the averaged weights
        self.layer = nn.Linear(3, 1)
        self.register_buffer("total", torch.zeros(3))
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.3, -0.2, 0.5]]))
            self.layer.bias.zero_()

    def terms(self, batch: Tensor, number: int) -> Tensor:
        if number in self.loss:
            batch = batch * float("inf")
        self.total += batch.sum(0)
        loss = (self.layer(batch) - 1).square().mean()
        loss = loss + float("inf") if number in self.value else loss  # its gradient is that of any other
        # The root has the value 0 and no finite slope.
        return loss + (0 * self.layer.weight.sum()).sqrt() if number in self.gradient else loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.terms(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.layer.parameters(), lr=0.1, weight_decay=0.1)


def batches() -> Tensor:
    return torch.randn(BATCHES, 4, 3, generator=torch.Generator().manual_seed(0))


def fit(
    module: LightningModule, folder: Path, *callbacks: Callback, resume: Path | None = None, first: int = 0,
    **options: Any,
):  # fmt: skip
    """Trains on the batches from the `first` on, those before it coming last."""
    options = {"max_epochs": 1, "log_every_n_steps": 1} | options
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=[*callbacks], enable_progress_bar=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(
        module, DataLoader(batches().roll(-first, 0), batch_size=None), ckpt_path=resume, weights_only=True
    )
    return trainer


def plain(module: Model, skipped: set[int], accumulate: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, their average and the running sum of a loop that does not make the `skipped` steps at all."""
    optimizer = module.configure_optimizers()
    average, updates = None, 0
    for step in range(BATCHES // accumulate):
        if step in skipped:
            continue
        optimizer.zero_grad()
        for number in range(step * accumulate, (step + 1) * accumulate):
            (module.terms(batches()[number], number) / accumulate).backward()
        optimizer.step()
        weight = module.layer.weight.detach()
        if average is None:
            average = weight.clone()
        else:
            updates += 1
            average.lerp_(weight, 1 - min(0.3, (1 + updates) / (10 + updates)))
    assert average is not None
    return weight.clone(), average, module.total


@pytest.mark.parametrize(
    ("accumulate", "skipped"), [(1, {2, 3, 7}), (3, {0, 1, 2})], ids=["each", "accumulated"]
)
def test_a_step_that_is_not_finite_leaves_no_trace(
    tmp_path: Path, accumulate: int, skipped: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Weights, decay, moments, averaged weights and statistics are those of a loop without it."""
    weight, average, total = plain(Model(), skipped, accumulate)
    module, health, ema = Model(loss=(2, 7), gradient=(3,)), HealthCallback(), EMACallback(decay=0.3)
    with caplog.at_level(logging.WARNING, logger="v2flow"):
        trainer = fit(module, tmp_path, ema, health, accumulate_grad_batches=accumulate)
    raw = ema._average_model.module.layer.weight  # changed places with the average at the end
    torch.testing.assert_close(raw.detach(), weight)
    torch.testing.assert_close(module.layer.weight.detach(), average)
    torch.testing.assert_close(module.total, total)
    assert health.state_dict()["skipped"] == len(skipped)
    assert trainer.callback_metrics["health/skipped_steps"] == len(skipped)
    assert [message for message in caplog.messages if "left out" in message]


def test_without_it_one_such_step_ruins_the_training(tmp_path: Path) -> None:
    module = Model(gradient=(3,))
    fit(module, tmp_path, HealthCallback(skip_nonfinite=False))
    assert module.layer.weight.isnan().all()


def test_a_healthy_training_is_not_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alone, watched = Model(), Model()
    fit(alone, tmp_path)
    with caplog.at_level(logging.WARNING, logger="v2flow"):
        fit(watched, tmp_path, HealthCallback())
    assert torch.equal(alone.layer.weight, watched.layer.weight) and torch.equal(alone.total, watched.total)
    assert not [record for record in caplog.records if record.name.startswith("v2flow")]


def last(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="last", every_n_epochs=100, enable_version_counter=False)


def test_too_many_in_a_row_stop_the_training_with_a_checkpoint(tmp_path: Path) -> None:
    weight, *_ = plain(Model(), {2, *range(4, BATCHES)})
    module = Model(loss=(2, 4), gradient=(5, 6, 7, 8))
    with pytest.raises(V2FlowError) as stopped:
        fit(module, tmp_path, HealthCallback(max_skipped=3), ExactResumeCallback(), last(tmp_path))
    message = str(stopped.value)
    assert message.startswith("training: 3 steps in a row, the last one step 7,")
    assert str(tmp_path / "last.ckpt") in message and "--trainer.detect_anomaly=true" in message
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 7
    torch.testing.assert_close(saved["state_dict"]["layer.weight"], weight)


def test_the_count_goes_on_after_a_resume(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(Model(loss=(1,)), tmp_path, HealthCallback(), saver)
    health = HealthCallback()
    fit(Model(loss=(1, 6)), tmp_path, health, resume=tmp_path / "step=4.ckpt")
    assert health.state_dict()["skipped"] == 2


class SaveAfter(Callback):
    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("bad", [{"loss": (7,)}, {"value": (6,)}], ids=["statistics", "loss alone"])
def test_a_resume_amid_the_accumulation_leaves_the_same_step_out(
    tmp_path: Path, bad: dict[str, tuple[int, ...]]
) -> None:
    """Saved after two of its three batches, one of which was not finite."""
    weight, _, total = plain(Model(), {2}, accumulate=3)
    path = tmp_path / "amid.ckpt"
    callbacks = [ExactResumeCallback(), SaveAfter(7, path)]
    fit(Model(**bad), tmp_path, HealthCallback(), *callbacks, accumulate_grad_batches=3)
    module, health = Model(**bad), HealthCallback()
    callbacks = [ExactResumeCallback(), health]
    fit(module, tmp_path, *callbacks, resume=path, first=8, accumulate_grad_batches=3)
    torch.testing.assert_close(module.layer.weight.detach(), weight)
    torch.testing.assert_close(module.total, total)
    assert health.state_dict()["skipped"] == 1


# --- what goes wrong slowly -------------------------------------------------------------------------------------


class Ailing(Model):
    """Gradients, entropies and code counts of each step as given."""

    def __init__(self, scale: list[float], entropy: list[float], codes: list[int]) -> None:
        super().__init__()
        self.scale, self.entropy, self.codes = scale, entropy, codes
        self.visual_vocabulary = VisualVocabulary(4, VisualVocabularyConfig(size=64))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("train/token_entropy", self.entropy[batch_idx])
        self.visual_vocabulary.counts.zero_()[: self.codes[batch_idx]] = 1.0
        return self.layer(batch.abs()).mean() * self.scale[batch_idx]


def ailments(module: Ailing, folder: Path, caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    """What is named, and after which step."""
    with caplog.at_level(logging.WARNING, logger="v2flow"):
        fit(module, folder, HealthCallback(patience=3, **options))
    return [" ".join(message.split()[1:6]) for message in caplog.messages if message.startswith("health:")]


FINE = {"scale": [1.0] * BATCHES, "entropy": [6.0] * BATCHES, "codes": [60] * BATCHES}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"scale": [1.0] * 6 + [1000.0] * 2 + [1.0] * 4}, ["exploding gradients at step 7:"]),
        ({"scale": [1000.0] + [1.0] * 11}, []),  # the first steps are long
        ({"entropy": [6.0] * 4 + [0.01] * 8}, ["entropy collapse at step 7:"]),
        ({"entropy": [6.0, 0.01, 0.01, 6.0] * 3}, []),  # does not last
        ({"entropy": [0.01] * 4 + [6.0] + [0.01] * 7}, ["entropy collapse at step 3:", "entropy collapse at step 8:"]),
        ({"entropy": [0.0] * BATCHES}, []),  # a tokenizer without a vocabulary
        ({"codes": [60] * 2 + [2] * 10}, ["codebook collapse at step 5:"]),
    ],
)  # fmt: skip
def test_ailments_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any], expected: list[str]
) -> None:
    assert ailments(Ailing(**FINE | change), tmp_path, caplog) == expected


def test_each_warning_has_figures_and_advice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ailments(Ailing([1.0] * BATCHES, [0.02] * BATCHES, [2] * BATCHES), tmp_path, caplog)
    entropy, codebook = (message for message in caplog.messages if message.startswith("health:"))
    assert "0.02 nats" in entropy and "resampler.scale" in entropy
    assert (
        "visual_vocabulary has a perplexity of 2.0 with 64 codes" in codebook and "revive_below" in codebook
    )


def test_a_frozen_codebook_is_not_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Ailing(**FINE | {"codes": [2] * BATCHES})
    module.visual_vocabulary.eval()
    assert ailments(module, tmp_path, caplog) == []


def test_between_the_looks_nothing_waits_for_the_device() -> None:
    """Tensors without data raise an error at any attempt to read them."""
    health = HealthCallback(skip_nonfinite=False)
    weight = nn.Parameter(torch.ones(3, device="meta"))
    weight.grad = torch.ones(3, device="meta")
    module: Any = SimpleNamespace(device=torch.device("meta"), log=lambda *_, **__: None)
    trainer: Any = SimpleNamespace(log_every_n_steps=50, global_step=49)
    health.on_before_backward(trainer, module, torch.ones((), device="meta"))
    health.on_before_optimizer_step(trainer, module, torch.optim.SGD([weight]))
    assert len(health._norms) == 1


def test_bad_options_are_refused() -> None:
    with pytest.raises(
        V2FlowError, match="option max_skipped of HealthCallback: expected at least 1, found 0"
    ):
        HealthCallback(max_skipped=0)
