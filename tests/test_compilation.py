"""Parts of a training under torch.compile, and what happens where that fails."""

import copy
import logging
from functools import partial
from typing import Any

import pytest
import torch
from core_toys import pictures, small_config
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from v2flow.config import DecoderConfig
from v2flow.training import tokenizer_module
from v2flow.training.compilation import compile_parts
from v2flow.training.optimizer import OptimizerConfig
from v2flow.training.tokenizer_module import TokenizerModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
STEPS = 3


def fails(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    raise OSError("no compiler here\nand a long story")


def fails_backward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    """Its forward pass is made, and its backward pass cannot be."""
    from torch._dynamo.backends.common import aot_autograd

    def nothing(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return graph

    return aot_autograd(fw_compiler=nothing, bw_compiler=fails)(graph, inputs)


class Losses(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["loss"].item())


def train(decoder: DecoderConfig, compile: bool) -> tuple[TokenizerModule, list[float]]:
    torch._dynamo.reset()
    module = TokenizerModule(
        small_config(decoder=decoder), OptimizerConfig(total_steps=STEPS, warmup_steps=0), compile=compile
    )
    samples = [{"image": image} for image in pictures(4 * STEPS)]
    losses = Losses()
    trainer = Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[losses],
    )  # fmt: skip
    trainer.fit(module, DataLoader(samples, batch_size=4))
    return module, losses.values


def use(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "compile_parts", partial(compile_parts, backend=backend))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Of v2flow and of torch.compile, which says there when it gives up."""
    return [r.getMessage() for r in caplog.records if r.name.startswith(("v2flow", "torch._dynamo"))]


DECODERS = [
    {"full_mask_share": 0.0},
    {"full_mask_share": 0.0, "prefix": "attend", "prefix_attention": "self"},
]


@pytest.mark.parametrize("options", DECODERS)
def test_compiled_training_is_the_same(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = DecoderConfig(width=16, heads=2, encoder_depth=1, decoder_depth=1, **options)
    plain, expected = train(decoder, compile=False)
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    use(counting, monkeypatch)
    with caplog.at_level(logging.WARNING):
        compiled, found = train(decoder, compile=True)
    assert len(graphs) >= 3 and not warnings(caplog)
    assert found == pytest.approx(expected, rel=1e-4)
    state = plain.state_dict()
    assert compiled.state_dict().keys() == state.keys()
    assert all(part._compiled_call_impl is None for part in copy.deepcopy(compiled).modules())


@pytest.mark.parametrize("backend", [fails, fails_backward])
def test_what_cannot_be_compiled_trains_as_without(
    backend: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = DecoderConfig(width=16, heads=2, encoder_depth=1, decoder_depth=1, full_mask_share=0.0)
    plain, expected = train(decoder, compile=False)
    use(backend, monkeypatch)
    with caplog.at_level(logging.WARNING):
        compiled, found = train(decoder, compile=True)
    assert warnings(caplog) == [
        f"option compile: {name} is not compiled, and runs as without: OSError: no compiler here"
        for name in ("resampler.encoder", "decoder", "head.field")
    ]
    assert found == expected, "the same steps, bit for bit"
    for name, value in plain.state_dict().items():
        assert torch.equal(compiled.state_dict()[name], value), name


def test_gradients_of_the_trial_are_not_kept() -> None:
    layer, x = nn.Linear(3, 2), torch.ones(4, 3)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    before = layer.weight.grad.clone()
    compile_parts({"layer": layer}, dynamic=True, backend="eager")
    out = layer(x)
    assert torch.equal(layer.weight.grad, before)
    out.sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * before)
