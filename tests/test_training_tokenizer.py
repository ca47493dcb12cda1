"""Training the tokenizer: optimiser, clock, draws, two steps on real pictures, and learning one batch by heart."""

import io
import json
import tarfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_toys import pictures, small_config
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from loopback import free_port
from torch import Tensor, nn
from torch.utils.data import DataLoader

from v2flow.config import (
    DecoderConfig,
    ResamplerConfig,
    TokenizerConfig,
    VelocityConfig,
    VisualVocabularyConfig,
    VocabularyConfig,
)
from v2flow.errors import V2FlowError
from v2flow.tokenizer import V2FlowTokenizer
from v2flow.training.ddp import LOCAL_BUFFERS
from v2flow.training.module import seeded_generator
from v2flow.training.optimizer import OptimizerConfig, configure_adamw, parameter_groups
from v2flow.training.tokenizer_module import TokenizerModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


class Recorder(Callback):
    """Learning rate, progress and a draw before, and total loss after, every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.progress: list[float] = []
        self.losses: list[float] = []
        self.draws: list[float] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.progress.append(pl_module.progress)
        self.draws.append(torch.rand((), generator=pl_module.step_generator(batch_idx)).item())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())


def loader(count: int = 32) -> DataLoader:
    samples = [{"image": image, "caption": "", "key": str(i)} for i, image in enumerate(pictures(count))]
    return DataLoader(samples, batch_size=4)


def fit(module: TokenizerModule, steps: int, folder: Path, **options: Any) -> Recorder:
    recorder = Recorder()
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, callbacks=[recorder],
    )  # fmt: skip
    trainer.fit(module, loader(), **options)
    assert trainer.global_step == steps
    return recorder


def make_module(seed: int = 0, **optimizer: Any) -> TokenizerModule:
    return TokenizerModule(small_config(), OptimizerConfig(**({"total_steps": 20, "warmup_steps": 4} | optimizer)),
                           seed=seed)  # fmt: skip


# --- optimiser and schedule -------------------------------------------------------------------------------------


def test_groups_hold_every_trainable_parameter_once() -> None:
    model = V2FlowTokenizer(small_config())
    model.head.field.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    found = [id(p) for group in groups for p in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}


def test_only_matrices_decay() -> None:
    model = V2FlowTokenizer(small_config())
    decayed, plain = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    names = {id(p): n for n, p in model.named_parameters()}
    for parameter in decayed["params"]:
        assert names[id(parameter)].endswith("weight") and parameter.ndim in (2, 4)
    free = {names[id(p)] for p in plain["params"]}
    for name in ("decoder.mask_token", "head.null_condition", "decoder.latent_positions", "decoder.project.bias",
                 "resampler.encoder.norm.weight", "decoder.encoder.blocks.0.norm1.weight"):  # fmt: skip
        assert name in free
    assert {names[id(p)] for p in decayed["params"]} >= {
        "decoder.project.weight",
        "resampler.encoder.stem.weight",
    }


def test_schedule_by_hand() -> None:
    config = OptimizerConfig(warmup_steps=4, total_steps=20, decay_share=0.5)
    assert [config.factor(k) for k in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert config.factor(10) == 1.0
    assert config.factor(15) == pytest.approx(0.5)
    assert config.factor(20) == config.factor(1000) == pytest.approx(0.01)
    constant = OptimizerConfig(warmup_steps=0, total_steps=20, decay_share=0.0)
    assert [constant.factor(k) for k in (0, 19, 500)] == [1.0] * 3


def test_each_window_has_a_schedule_of_its_own() -> None:
    config = OptimizerConfig(total_steps=40, warmup_steps=4, decay_share=0.5)
    half = OptimizerConfig(total_steps=20, warmup_steps=4, decay_share=0.5)
    first = [config.factor(k, 0.0, 0.5) for k in range(60)]
    assert first == [half.factor(k) for k in range(20)] + [0.0] * 40
    second = [config.factor(k, 0.5, 1.0) for k in range(60)]
    assert second == [0.0] * 20 + [half.factor(k) for k in range(40)]


def test_windows_share_out_every_parameter() -> None:
    model = V2FlowTokenizer(small_config())
    groups = parameter_groups(model, 0.1, {"head.field.": (0.6, 1.0), "": (0.0, 0.6)})
    field = [id(p) for p in model.head.field.parameters()]
    assert {id(p) for g in groups if g["window"] == (0.6, 1.0) for p in g["params"]} == set(field)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0] * 2


def test_a_field_trained_last_leaves_the_rest_as_it_was(tmp_path: Path) -> None:
    """The switch falls inside the run: whatever the optimiser remembers, tokens and means stand still after it."""
    velocity = VelocityConfig(width=16, depth=1, heads=2, fine_width=8, alone=0.5)
    kept: list[dict[str, Tensor]] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            kept.append({n: v.detach().clone() for n, v in pl_module.model.state_dict().items()})

    module = TokenizerModule(small_config(velocity=velocity), OptimizerConfig(total_steps=8, warmup_steps=1))
    trainer = Trainer(
        max_steps=8, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, callbacks=[Keep()],
    )  # fmt: skip
    trainer.fit(module, loader())
    moved = [{n for n in a if not torch.equal(a[n], b[n])} for a, b in pairwise(kept)]
    assert all(not any(n.startswith("head.field.") for n in names) and names for names in moved[:3])
    assert all(
        names and all(n.startswith(("head.field.", "head.residual_")) for n in names) for names in moved[3:]
    )


def test_the_rate_changes_every_step(tmp_path: Path) -> None:
    """Read from the optimiser of a real training: 8 batches an epoch, so an epoch-wise schedule would stand still."""
    recorder = fit(make_module(lr=1e-2, warmup_steps=4, total_steps=10, decay_share=0.5), 10, tmp_path)
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert recorder.rates == pytest.approx([1e-2 * f for f in expected])
    assert recorder.progress == pytest.approx([k / 10 for k in range(10)])


def test_optimizer_options_are_checked() -> None:
    with pytest.raises(V2FlowError, match="total_steps >= 1.*found 0"):
        OptimizerConfig(total_steps=0)
    with pytest.raises(V2FlowError, match="decay_share.*found 1.5"):
        OptimizerConfig(decay_share=1.5)
    adamw = configure_adamw(nn.Linear(2, 2), OptimizerConfig(lr=0.1, betas=(0.8, 0.9), warmup_steps=0))
    assert adamw["optimizer"].defaults["betas"] == (0.8, 0.9)
    assert adamw["lr_scheduler"]["interval"] == "step"


def test_the_optimiser_is_fused_where_that_helps() -> None:
    layers = [nn.Linear(7, 5) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = []
    for layer, fused in zip(layers, (None, False), strict=True):
        config = OptimizerConfig(lr=0.1, warmup_steps=0, total_steps=100, fused=fused)
        optimizers.append(configure_adamw(layer, config)["optimizer"])
    assert [bool(optimizer.defaults["fused"]) for optimizer in optimizers] == [True, False]
    inputs = torch.randn(20, 3, 7, generator=torch.Generator().manual_seed(0))
    for layer, optimizer in zip(layers, optimizers, strict=True):
        for x in inputs:
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(*(layer.weight for layer in layers), atol=1e-5, rtol=1e-5)


def test_the_optimiser_is_not_fused_where_gradients_are_scaled() -> None:
    """Lightning could not clip them."""
    module = make_module()
    assert module.configure_optimizers()["optimizer"].defaults["fused"]
    module._trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()))  # type: ignore[assignment]
    assert not module.configure_optimizers()["optimizer"].defaults["fused"]
    module.optimizer_config.fused = True
    with pytest.raises(
        V2FlowError, match="optimizer.fused: true does not go with trainer.precision=16-mixed"
    ):
        module.configure_optimizers()


# --- random draws -----------------------------------------------------------------------------------------------


def test_generators_depend_on_their_key_alone() -> None:
    def draw(*key: int) -> Tensor:
        return torch.randn(2000, generator=seeded_generator(torch.device("cpu"), *key))

    assert torch.equal(draw(1, 2, 3), draw(1, 2, 3))
    others = [draw(*key) for key in ((1, 2, 4), (1, 3, 3), (2, 2, 3), (3, 2, 1), (1, 2), (1, 2, 3, 0))]
    for other in others:
        correlation = torch.corrcoef(torch.stack([draw(1, 2, 3), other]))[0, 1]
        assert abs(correlation) < 0.1  # 4.5 standard errors


def test_first_weights_depend_on_the_seed_alone() -> None:
    state = make_module(seed=5).model.state_dict()
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    again = make_module(seed=5).model.state_dict()
    assert torch.equal(torch.random.get_rng_state(), before), "building a module moved the global generator"
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not torch.equal(make_module(seed=6).model.state_dict()["decoder.project.weight"],
                           state["decoder.project.weight"])  # fmt: skip


def test_equal_seeds_give_equal_losses(tmp_path: Path) -> None:
    runs = []
    for noise in (1, 2):
        module = make_module(seed=3)
        torch.manual_seed(noise)  # the global generator must have no part in it
        runs.append((fit(module, 4, tmp_path).losses, module.model.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())
    assert fit(make_module(seed=4), 4, tmp_path).losses != runs[0][0]


def test_each_step_has_its_own_draws(tmp_path: Path) -> None:
    """Keyed by seed, step and batch: distinct over a training, repeated by the next one."""
    draws = [fit(make_module(seed=seed), 5, tmp_path).draws for seed in (3, 3, 4)]
    assert len(set(draws[0])) == 5
    assert draws[1] == draws[0]
    assert not set(draws[2]) & set(draws[0])


# --- the module under Lightning ---------------------------------------------------------------------------------


def test_validation_repeats_itself(tmp_path: Path) -> None:
    module = make_module()
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    first, second = (trainer.validate(module, loader(), verbose=False)[0] for _ in range(2))
    assert first == second
    assert {"val/loss", "val/mean", "val/flow", "val/token_entropy", "val/soft_hard_agreement"} <= set(first)
    assert 0 <= first["val/soft_hard_agreement"] <= 1
    assert 0 < first["val/token_entropy"] <= torch.tensor(60.0).log()


def test_training_logs_its_terms(tmp_path: Path) -> None:
    module = make_module()
    fit(module, 2, tmp_path)
    logged = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    names = ("loss", "mean", "flow", "commitment", "token_entropy", "soft_hard_agreement")
    assert {f"train/{name}" for name in names} <= set(logged)
    config = module.model.config
    expected = logged["train/mean"] + config.velocity.weight * logged["train/flow"]
    expected += config.visual_vocabulary.commitment * logged["train/commitment"]
    assert logged["train/loss"] == pytest.approx(expected, rel=1e-4)


def test_decode_modes() -> None:
    module = make_module()
    ids = module.model.encode(pictures(2))
    for options in module.decode_modes.values():
        assert module.model.decode(ids, **options).shape == (2, 3, 16, 16)
    with pytest.raises(V2FlowError, match="decode option 'stepz'"):
        TokenizerModule(small_config(), decode_modes={"odd": {"stepz": 1}})
    with pytest.raises(V2FlowError, match="decode_modes: odd: decode option steps: .* found 2.5"):
        TokenizerModule(small_config(), decode_modes={"odd": {"steps": 2.5}})
    unguided = small_config(decoder=replace(small_config().decoder, null_probability=0.0))
    with pytest.raises(V2FlowError, match="option guidance: expected 1, found 2"):
        TokenizerModule(unguided, decode_modes={"odd": {"guidance": 2.0}})


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_other_precisions_are_refused_before_training(precision: Any, tmp_path: Path) -> None:
    trainer = Trainer(
        precision=precision, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(
        V2FlowError, match=f"option trainer.precision: expected one of 32-true, .* found {precision}"
    ):
        trainer.fit(make_module(), loader())


def two_steps(data: Any, folder: Path) -> TokenizerModule:
    """Two steps and a validation; almost everything moved, and the losses are those of pictures."""
    config = small_config(image_size=32)
    module = TokenizerModule(config, OptimizerConfig(total_steps=2, warmup_steps=0))
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    recorder = Recorder()
    trainer = Trainer(
        max_steps=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
        val_check_interval=2, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[recorder],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2 and len(recorder.losses) == 2
    assert float(trainer.callback_metrics["val/loss"]) > 0
    unchanged = [
        n for n, v in module.model.state_dict().items() if torch.equal(v, before[n]) and v.is_floating_point()
    ]
    # Zero-initialised layers shield what lies behind them from the first steps; the rest has moved.
    assert len(unchanged) < len(before) / 2
    for name in (
        "decoder.project.weight",
        "resampler.query.weight",
        "visual_vocabulary.codes",
        "head.mean.weight",
    ):
        assert name not in unchanged
    return module


def test_two_steps_on_cifar10_shards(shared_data: Path, tmp_path: Path) -> None:
    from v2flow.training.data_module import ShardDataModule

    data = ShardDataModule(
        train=str(shared_data / "cifar10" / "train-{000000..000001}.tar"),
        val=str(shared_data / "cifar10" / "test-000000.tar"),
        image_size=32, batch_size=8, eval_batch_size=8, num_workers=0, seed=0, val_limit=16,
    )  # fmt: skip
    two_steps(data, tmp_path)


def test_two_steps_on_openmoji(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    from v2flow.data.openmoji import build_openmoji
    from v2flow.training.data_module import ShardDataModule

    build_openmoji(tmp_path / "openmoji", size=32, limit=120)
    train, val = (str(tmp_path / "openmoji" / f"{split}-*.tar") for split in ("train", "val"))
    data = ShardDataModule(
        train=train, val=val, test=val, image_size=32, batch_size=8, eval_batch_size=8, num_workers=0, seed=0
    )
    module = two_steps(data, tmp_path)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (figures,) = trainer.test(module, datamodule=data, verbose=False)
    assert figures["test/loss"] > 0 and figures["test/token_entropy"] > 0


def staged_module(alone: float) -> TokenizerModule:
    velocity = VelocityConfig(width=16, depth=1, heads=2, fine_width=8, alone=alone)
    return TokenizerModule(small_config(velocity=velocity), OptimizerConfig(total_steps=4, warmup_steps=0))


def everything(module: TokenizerModule) -> dict[str, Tensor]:
    """Parameters and buffers, also those that no checkpoint stores."""
    return module.model.state_dict() | dict(module.model.named_buffers())


def fit_rank(rank: int, folder: str, alone: float) -> None:
    """One of two gloo processes of Lightning's DDP: four steps on its half of the pictures."""
    import os

    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}
    os.environ.update(address | {"WORLD_SIZE": "2", "NODE_RANK": str(rank), "LOCAL_RANK": "0"})
    module = staged_module(alone)
    broadcasts: list[bool] = []
    look = LambdaCallback(
        on_train_start=lambda trainer, _: broadcasts.append(trainer.model.broadcast_buffers)
    )
    trainer = Trainer(
        max_steps=4, accelerator="cpu", devices=1, num_nodes=2, callbacks=[look], strategy=LOCAL_BUFFERS, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        use_distributed_sampler=False,
    )  # fmt: skip
    batches = [{"image": pictures(8, seed=step)[rank::2]} for step in range(4)]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert broadcasts == [False]
    torch.save(everything(module), Path(folder, f"{rank}.pt"))
    state = trainer.optimizers[0].state
    steps = {name: int(state[p]["step"]) for name, p in module.model.named_parameters() if p in state}
    Path(folder, f"{rank}.json").write_text(json.dumps(steps))


@pytest.mark.parametrize("alone", [0.0, 0.5])
def test_two_processes_stay_equal(alone: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a stage leaves parameters without gradients, for which other ranks would wait; buffers too, to the
    bit, though nothing broadcasts them."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    (tmp_path / "port").write_text(str(free_port()))
    torch.multiprocessing.spawn(fit_rank, (str(tmp_path), alone), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    start = everything(staged_module(alone))
    moved = {name for name, value in first.items() if not torch.equal(value, start[name])}
    assert {"decoder.project.weight", "head.field.fine_output.2.weight"} <= moved
    assert {f"visual_vocabulary.{name}" for name in ("codes", "sums", "counts")} <= moved
    assert {"head.residual_std", "head.residual_batches"} <= moved and "resampler.table" in first
    # AdamW has counted, as on one rank, the steps in which a parameter learned.
    steps = json.loads((tmp_path / "0.json").read_text())
    assert set(steps.values()) == {2 if alone else 4} and "head.field.fine_output.2.weight" in steps


# --- it learns --------------------------------------------------------------------------------------------------


def first_pictures(shard: Path, count: int) -> Tensor:
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    images: list[Tensor] = []
    with tarfile.open(shard) as archive:
        for member in archive:
            if member.name.endswith((".jpg", ".png")) and len(images) < count:
                data = archive.extractfile(member)
                assert data is not None
                images.append(pil_to_tensor(Image.open(io.BytesIO(data.read())).convert("RGB")) / 255)
    return torch.stack(images)


def psnr(a: Tensor, b: Tensor) -> float:
    return float((-10 * (a - b).square().flatten(1).mean(1).log10()).mean())


@pytest.mark.slow
def test_one_batch_is_learned_by_heart_from_its_ids(shared_data: Path) -> None:
    """Eight photographs come back at 30 dB from 64 ids each, and not from the same ids in other places."""
    images = first_pictures(shared_data / "cifar10" / "train-000000.tar", 8)
    config = TokenizerConfig(
        image_size=32,
        vocabulary=VocabularyConfig(source="wordllama", size=512),
        resampler=ResamplerConfig(width=64, depth=1, key_dim=32),
        visual_vocabulary=VisualVocabularyConfig(size=256, decay=0.9),
        decoder=DecoderConfig(width=64, heads=4, encoder_depth=1, decoder_depth=1, full_mask_share=1.0,
                              null_probability=0.0),
        velocity=VelocityConfig(width=32, depth=1, heads=2, fine_width=8),
    )  # fmt: skip
    torch.manual_seed(0)
    model = V2FlowTokenizer(config).train()
    steps = 260
    setup = configure_adamw(
        model, OptimizerConfig(lr=4e-3, warmup_steps=10, total_steps=steps, weight_decay=0.0)
    )
    optimizer, scheduler = setup["optimizer"], setup["lr_scheduler"]["scheduler"]
    for step in range(steps):
        losses = model.losses(images, step / steps, seeded_generator(images.device, 0, step))
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    ids = model.encode(images)
    assert ids.unique().numel() > 128
    assert psnr(model.decode(ids, steps=1, temperature=0.0), images) >= 30
    places = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(1))
    shuffled = ids.flatten()[places].view_as(ids)
    assert psnr(model.decode(shuffled, steps=1, temperature=0.0), images) < 15
    assert psnr(model.decode(ids.roll(1, 0), steps=1, temperature=0.0), images) < 15, "other pictures' ids"
