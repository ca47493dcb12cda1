"""The TiTok-style baseline: tokens without a grid, learning, checkpoints, the command line, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from core_toys import pictures
from lightning.pytorch import Trainer
from test_baseline import psnr
from torch.utils.data import DataLoader
from training_toys import experiment, write, write_shards

from v2flow.baselines.module import TiTokModule
from v2flow.baselines.titok import TiTokAutoencoder, TiTokConfig
from v2flow.cli import main
from v2flow.cli_training import build_experiment
from v2flow.config import CodecConfig
from v2flow.errors import V2FlowError
from v2flow.training.checkpoint import load_model
from v2flow.training.optimizer import OptimizerConfig

OPTIONS: dict[str, Any] = {
    "image_size": 16, "codebook_size": 32, "code_dim": 8, "num_tokens": 6, "width": 16, "heads": 2,
    "encoder_depth": 1, "decoder_depth": 1,
}  # fmt: skip


def titok_config(**options: Any) -> TiTokConfig:
    return TiTokConfig(**(OPTIONS | {"codec": CodecConfig(patch_size=4)} | options))


@pytest.fixture
def model() -> TiTokAutoencoder:
    return TiTokAutoencoder(titok_config())


@pytest.mark.parametrize("tokens", [1, 7, 16, 40])
def test_any_number_of_tokens(tokens: int) -> None:
    """Fewer than the 16 latent positions, as many, or more."""
    model = TiTokAutoencoder(titok_config(num_tokens=tokens))
    ids = model.encode(pictures(5))
    assert ids.shape == (5, tokens) == (5, model.num_tokens) and ids.dtype == torch.long
    assert ids.min() >= 0 and ids.max() < model.codebook_size == 32
    images = model.decode(ids)
    assert images.shape == (5, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(model.decode(ids), images)
    assert model.decode(ids[:0]).shape == (0, 3, 16, 16)


def test_encode_repeats_itself_and_changes_nothing(model: TiTokAutoencoder) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = pictures(6)
    ids = model.encode(images)
    assert torch.equal(torch.cat([model.encode(image[None]) for image in images]), ids)
    assert torch.equal(model.encode(images.flip(0)), ids.flip(0))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tokens_have_no_place(model: TiTokAutoencoder) -> None:
    """Each one reaches every position, and each position is seen by every token."""
    codes = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for position in range(16):
        (gradient,) = torch.autograd.grad(model.latents(codes).flatten(2)[..., position].sum(), codes)
        assert (gradient.norm(dim=-1) > 0).all()
    latents = model.codec.encode(pictures(1)).requires_grad_()
    for token in range(6):
        (gradient,) = torch.autograd.grad(model.features(latents)[:, token].sum(), latents)
        assert (gradient.norm(dim=1) > 0).all()


def test_queries_alone_are_quantised(model: TiTokAutoencoder) -> None:
    """What the encoder says at the positions of the latents is not read: 6 features, those behind the latents."""
    outputs: list[torch.Tensor] = []
    model.encoder.register_forward_hook(lambda module, args, output: outputs.append(output))
    features = model.features(model.codec.encode(pictures(2)))
    assert outputs[0].shape == (2, 16 + 6, 16) and features.shape == (2, 6, 8)
    torch.testing.assert_close(features, model.to_code(outputs[0][:, 16:]))


def test_decode_is_what_the_loss_trained(model: TiTokAutoencoder) -> None:
    model.eval()
    with torch.no_grad():
        model.output.weight.mul_(0.1)  # so that nothing is clamped
        images = pictures(4)
        _, terms = model.losses(images)
        error = (model.decode(model.encode(images)) - images).square().mean() * model.config.codec.scale**2
    torch.testing.assert_close(terms["mean"], error)


def test_every_parameter_gets_a_gradient(model: TiTokAutoencoder) -> None:
    """The queries included: the straight-through estimate carries the loss past the quantiser."""
    total, _ = model.train().losses(pictures(4))
    total.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == [] and model.queries.grad is not None
    assert (model.queries.grad.norm(dim=1) > 0).all()


def test_one_batch_is_learned_by_heart_from_its_ids() -> None:
    torch.manual_seed(0)
    model = TiTokAutoencoder(titok_config(width=32, codebook_size=64)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    images = pictures(4)
    for _ in range(150):
        optimizer.zero_grad()
        model.losses(images)[0].backward()
        optimizer.step()
    ids = model.encode(images)
    assert psnr(model.decode(ids), images) > 25
    assert psnr(model.decode(ids.roll(1, 0)), images) < 15


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_checkpoints_load_as_the_trained_model(tmp_path: Path) -> None:
    module = TiTokModule(titok_config(), OptimizerConfig(total_steps=3, warmup_steps=1), seed=1)
    start = {name: value.clone() for name, value in module.model.state_dict().items()}
    trainer = Trainer(
        max_steps=3, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader([{"image": pictures(8)}] * 3, batch_size=None))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    model, info = load_model(tmp_path / "end.ckpt")
    assert info["model"] == "TiTokAutoencoder" and info["step"] == 3 and not model.training
    assert model.config == module.model.config and model.num_tokens == 6
    assert not torch.equal(model.queries, start["queries"])
    ids = module.model.encode(pictures(4))
    assert torch.equal(model.encode(pictures(4)), ids)
    assert torch.equal(model.decode(ids), module.model.decode(ids))


def test_it_trains_through_the_command_line(tmp_path: Path) -> None:
    config = experiment(write_shards(tmp_path), tmp_path)
    config["model"]["class_path"] = "v2flow.baselines.module.TiTokModule"
    config["model"]["init_args"].pop("tokenizer")
    config["model"]["init_args"]["autoencoder"] = OPTIONS
    config["model"]["init_args"]["optimizer"]["total_steps"] = 2
    assert main(["fit", "--config", write(config, tmp_path / "e.yaml")]) == 0
    model, info = load_model(tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt")
    assert isinstance(model, TiTokAutoencoder) and info["step"] == 2 and model.num_tokens == 6


def test_the_experiment_is_as_large_as_its_neighbours(repository: Path) -> None:
    """Beside the VQ autoencoder: parameters within five per cent, the same bits, steps and data."""
    (ours, data), (theirs, other) = (
        build_experiment(["--config", str(repository / "experiments" / "tokenizer" / f"cifar10-32-{n}.yaml")])
        for n in ("titok", "vq")
    )
    sizes = [sum(p.numel() for p in module.model.parameters()) for module in (ours, theirs)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05) and sizes[0] == pytest.approx(4.2e6, rel=0.05)
    assert ours.model.num_tokens == theirs.model.num_tokens == 64
    assert ours.model.codebook_size == theirs.model.codebook_size
    assert ours.optimizer_config == theirs.optimizer_config
    assert dict(data.hparams) == dict(other.hparams)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "option num_tokens: expected at least 1, found 0"),
        (
            {"encoder_depth": 0},
            "option encoder_depth: expected a number >= 1 of blocks, at most 1000, found 0",
        ),
        ({"heads": 3}, "option heads: expected a divisor of width 16, found 3"),
        ({"codebook_size": 1}, "option codebook_size"),
        ({"image_size": 18}, "multiples of 4.*nearest is 16x16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(V2FlowError, match=message) as error:
        TiTokAutoencoder(titok_config(**options))
    assert "\n" not in str(error.value)


def test_ids_that_do_not_fit_are_refused(model: TiTokAutoencoder) -> None:
    with pytest.raises(V2FlowError, match=r"shape \[B, 6\]"):
        model.decode(torch.zeros(1, 7, dtype=torch.long))
    with pytest.raises(V2FlowError, match="from 0 to 31, found 0 to 32"):
        model.decode(torch.tensor([[0, 32, 0, 0, 0, 0]]))
