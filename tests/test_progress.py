"""The bar of a training: what it shows, and how seldom it asks for it; and the line of what cannot be counted."""

import io
import sys
import time
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from v2flow import cli_progress
from v2flow.training.progress import RunProgressBar

STEPS = 4


class Counting(LightningModule):
    """Its loss is the number of the step, from 1, in halves of gradient accumulation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("loss", torch.tensor(self.global_step + 1.0), prog_bar=True)
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("interval", "expected"), [(3600.0, [STEPS]), (0.0, [1, 2, 3, STEPS])])
def test_figures_are_read_where_the_bar_is_drawn(
    interval: float, expected: list[int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    bar, read = RunProgressBar(log_interval=interval), []
    get_metrics = bar.get_metrics

    def reading(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        read.append(trainer.global_step)
        return get_metrics(trainer, module)

    monkeypatch.setattr(bar, "get_metrics", reading)
    trainer = Trainer(
        accelerator="cpu", max_steps=STEPS, accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[bar],
    )  # fmt: skip
    trainer.fit(Counting(), DataLoader(torch.ones(2 * STEPS, 1)))
    assert read == expected
    shown = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "train:" in line]
    assert f"{STEPS}/{STEPS}" in shown[-1] and f"loss={STEPS}" in shown[-1]
    assert sum("loss=" in line for line in shown) >= len(expected)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "delay", "expected"),
    [(Terminal(), 0.01, "v2flow: loading it …\n"), (Terminal(), 60.0, ""), (io.StringIO(), 0.0, "")],
)
def test_what_takes_long_is_said_once_in_a_terminal(
    stream: io.StringIO, delay: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(cli_progress, "DELAY", delay)
    with pytest.raises(KeyError), cli_progress.waiting("loading it"):
        end = time.monotonic() + 10
        while expected and not stream.getvalue().endswith("\n") and time.monotonic() < end:
            time.sleep(0.01)
        raise KeyError
    assert stream.getvalue() == expected
