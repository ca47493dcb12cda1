"""The VQ autoencoder baseline: ids and pictures, learning, checkpoints, several processes, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from core_toys import pictures, small_config
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from v2flow.baselines.module import VQAutoencoderModule
from v2flow.baselines.vq_autoencoder import VQAutoencoder, VQAutoencoderConfig
from v2flow.config import CodecConfig, ResamplerConfig
from v2flow.errors import V2FlowError
from v2flow.tokenizer import V2FlowTokenizer
from v2flow.training.checkpoint import load_model
from v2flow.training.ema import EMACallback
from v2flow.training.optimizer import OptimizerConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*resumed from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def vq_config(**options: Any) -> VQAutoencoderConfig:
    defaults: dict[str, Any] = {
        "image_size": 16,
        "codec": CodecConfig(patch_size=4),
        "encoder": ResamplerConfig(width=16, depth=1, token_grid=[4, 2]),
        "codebook_size": 32,
        "code_dim": 8,
        "width": 16,
        "heads": 2,
        "depth": 2,
    }
    return VQAutoencoderConfig(**(defaults | options))


@pytest.fixture
def model() -> VQAutoencoder:
    return VQAutoencoder(vq_config())


def codebook_state(model: VQAutoencoder) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.quantizer.state_dict().items()}


def equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * (a - b).square().mean().log10())


# --- ids and pictures -------------------------------------------------------------------------------------------


def test_ids_are_of_the_stated_shape_and_range(model: VQAutoencoder) -> None:
    ids = model.encode(pictures(6))
    assert ids.shape == (6, model.num_tokens) == (6, 8) and ids.dtype == torch.long
    assert ids.min() >= 0 and ids.max() < model.codebook_size == 32
    assert len(ids.unique()) > 2


@pytest.mark.parametrize("training", [True, False])
def test_encode_repeats_itself_and_changes_nothing(model: VQAutoencoder, training: bool) -> None:
    """In either mode, in other batch sizes and orders; the codebook's statistics stay bit by bit."""
    model.train(training)
    before = codebook_state(model)
    images = pictures(6)
    ids = model.encode(images)
    assert torch.equal(model.encode(images), ids)
    assert torch.equal(torch.cat([model.encode(image[None]) for image in images]), ids)
    assert torch.equal(model.encode(images.flip(0)), ids.flip(0))
    assert torch.equal(model.decode(ids), model.decode(ids))
    assert equal_states(codebook_state(model), before)
    assert model.training is training and model.quantizer.training is training


def test_decode_gives_pictures_that_depend_on_the_ids_alone(model: VQAutoencoder) -> None:
    with torch.no_grad():
        model.output.weight.mul_(20)  # far outside [0, 1] before the clamp
    ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    images = model.decode(ids, torch.Generator().manual_seed(5))
    assert images.shape == (2, 3, 16, 16)
    assert images.min() == 0 and images.max() == 1
    assert torch.equal(model.decode(ids), images)
    assert not torch.equal(images[0], images[1])
    assert model.decode(ids[:0]).shape == (0, 3, 16, 16)


def test_decode_is_what_the_loss_trained(model: VQAutoencoder) -> None:
    """The squared error of the loss is that of decode(encode(images)), in the codec's units."""
    model.eval()
    with torch.no_grad():
        model.output.weight.mul_(0.1)  # so that nothing is clamped
        images = pictures(4)
        _, terms = model.losses(images)
        error = (model.decode(model.encode(images)) - images).square().mean() * model.config.codec.scale**2
    torch.testing.assert_close(terms["mean"], error)


def test_each_token_stands_where_its_pixels_are() -> None:
    """Without attention a token reaches no further than the pixels under it: 4 rows of 8 for a 4x2 grid on 16 px."""
    model = VQAutoencoder(vq_config(depth=0))
    ids = torch.randint(0, 32, (1, 8), generator=torch.Generator().manual_seed(0))
    for token in range(8):
        other = ids.clone()
        other[0, token] = (other[0, token] + 1) % 32
        changed = (model.decode(other) != model.decode(ids))[0].any(0)
        expected = torch.zeros(16, 16, dtype=torch.bool)
        row, column = 4 * (token // 2), 8 * (token % 2)
        expected[row : row + 4, column : column + 8] = True
        assert torch.equal(changed, expected)


def test_the_encoder_is_v2flows() -> None:
    ours = V2FlowTokenizer(small_config()).resampler.encoder
    theirs = VQAutoencoder(vq_config()).encoder
    assert type(ours) is type(theirs)
    assert {n: p.shape for n, p in ours.named_parameters()} == {
        n: p.shape for n, p in theirs.named_parameters()
    }


def test_every_parameter_gets_a_gradient(model: VQAutoencoder) -> None:
    """The straight-through estimate carries the loss past the quantiser to the encoder."""
    total, _ = model.train().losses(pictures(4))
    total.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_codes_that_nobody_uses_are_revived() -> None:
    def used_after(threshold: float) -> int:
        torch.manual_seed(0)
        model = VQAutoencoder(vq_config(dead_code_threshold=threshold, decay=0.5)).train()
        with torch.no_grad():
            for step in range(8):
                model.losses(pictures(16, seed=step))
        return len(model.encode(pictures(64, seed=99)).unique())

    assert used_after(1.0) > 1.3 * used_after(0.0)


def test_one_batch_is_learned_by_heart_from_its_ids() -> None:
    torch.manual_seed(0)
    model = VQAutoencoder(vq_config(width=32, codebook_size=64)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    images = pictures(4)
    for _ in range(150):
        optimizer.zero_grad()
        model.losses(images)[0].backward()
        optimizer.step()
    ids = model.encode(images)
    assert psnr(model.decode(ids), images) > 28
    assert psnr(model.decode(ids.roll(1, 0)), images) < 15


# --- training under Lightning -----------------------------------------------------------------------------------


class Recorder(Callback):
    """Losses of every step, the names of what was logged, and whether a step drew from the global generator."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.names: set[str] = set()
        self.untouched: list[bool] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = torch.random.get_rng_state()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.untouched.append(torch.equal(torch.random.get_rng_state(), self.before))
        self.losses.append(outputs["loss"].item())
        self.names |= set(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.names |= set(trainer.callback_metrics)


def make_module(seed: int = 1) -> VQAutoencoderModule:
    return VQAutoencoderModule(vq_config(), OptimizerConfig(total_steps=4, warmup_steps=1), seed=seed)


def fit(
    module: VQAutoencoderModule,
    folder: Path,
    *callbacks: Callback,
    steps: int = 4,
    resume: Path | None = None,
) -> Trainer:
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, callbacks=[*callbacks],
        num_sanity_val_steps=0, gradient_clip_val=3.0,
    )  # fmt: skip
    # Every batch is the same, so that a resume needs no loader that remembers its place.
    train = DataLoader([{"image": pictures(8)}] * 8, batch_size=None)
    val = DataLoader([{"image": pictures(8), "valid": torch.arange(8) < 5}], batch_size=None)
    trainer.fit(module, train, val, ckpt_path=None if resume is None else str(resume), weights_only=True)
    return trainer


def test_losses_are_logged_under_the_tokenizers_names(tmp_path: Path) -> None:
    recorder = Recorder()
    module = make_module()
    trainer = fit(module, tmp_path, recorder)
    trainer.validate(module, DataLoader([{"image": pictures(2)}], batch_size=None), verbose=False)
    names = recorder.names | set(trainer.callback_metrics)
    assert {"train/loss", "train/mean", "train/quantizer", "val/loss", "val/mean"} <= names
    assert module.decode_modes == {"one_step": {}}


def test_equal_seeds_give_equal_trainings(tmp_path: Path) -> None:
    """Dead codes are revived from the global generator; what was drawn from it before must not matter."""
    records = []
    for seed, noise in ((1, 0), (1, 123), (2, 0)):
        torch.manual_seed(noise)
        module, recorder = make_module(seed), Recorder()
        fit(module, tmp_path, recorder)
        assert recorder.untouched == [True] * 4
        records.append((recorder.losses, codebook_state(module.model)))
    assert records[0][0] == records[1][0] and equal_states(records[0][1], records[1][1])
    assert records[0][0] != records[2][0]


def test_a_resumed_training_equals_one_in_a_piece(tmp_path: Path) -> None:
    whole, rest = Recorder(), Recorder()
    a, b = make_module(), make_module()
    trainers = [fit(a, tmp_path, EMACallback(), whole)]
    fit(b, tmp_path, EMACallback(), steps=2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = make_module()
    trainers.append(fit(resumed, tmp_path, EMACallback(), rest, resume=tmp_path / "half.ckpt"))
    assert rest.losses == whole.losses[2:]
    checkpoints = []
    for i, trainer in enumerate(trainers):
        trainer.save_checkpoint(tmp_path / f"{i}.ckpt")
        checkpoints.append(torch.load(tmp_path / f"{i}.ckpt", weights_only=True))
    for key in ("state_dict", "current_model_state"):
        assert equal_states(checkpoints[0][key], checkpoints[1][key])


def test_checkpoints_load_as_the_trained_model(tmp_path: Path) -> None:
    module = make_module()
    fit(module, tmp_path).save_checkpoint(tmp_path / "end.ckpt")
    model, info = load_model(tmp_path / "end.ckpt")
    assert info["model"] == "VQAutoencoder" and info["decode_modes"] == {"one_step": {}} and info["step"] == 4
    assert model.config == module.model.config and not model.training
    ids = module.model.encode(pictures(4))
    assert torch.equal(model.encode(pictures(4)), ids)
    assert torch.equal(model.decode(ids), module.model.decode(ids))


# --- two processes ----------------------------------------------------------------------------------------------

BATCH = 16


def train_rank(rank: int, folder: str, threshold: float) -> None:
    """One of two gloo processes: made before its group, as Lightning does it, then three steps on its half."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = VQAutoencoder(vq_config(dead_code_threshold=threshold)).train()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model.follow_process_group()
    torch.manual_seed(rank)
    with torch.no_grad():
        for step in range(3):
            model.losses(pictures(BATCH, seed=step)[rank::2])
    torch.save(codebook_state(model), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def two_processes(folder: Path, threshold: float) -> list[dict[str, torch.Tensor]]:
    torch.multiprocessing.spawn(train_rank, (str(folder), threshold), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_are_one_with_the_joint_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    alone = VQAutoencoder(vq_config(dead_code_threshold=0.0)).train()
    with torch.no_grad():
        for step in range(3):
            alone.losses(pictures(BATCH, seed=step))
    first, second = two_processes(tmp_path, 0.0)
    assert equal_states(first, second)
    for name, value in codebook_state(alone).items():
        torch.testing.assert_close(first[name], value)


def test_revival_is_the_same_in_both_processes(tmp_path: Path) -> None:
    first, second = two_processes(tmp_path, 3.0)
    assert equal_states(first, second)
    torch.manual_seed(0)
    plain = VQAutoencoder(vq_config(dead_code_threshold=0.0)).train()
    with torch.no_grad():
        for step in range(3):
            plain.losses(pictures(BATCH, seed=step))
    assert not torch.allclose(first["inner._codebook.embed"], plain.quantizer.inner.codebook[None]), (
        "nothing was revived"
    )


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": ResamplerConfig(width=16, token_grid=[8, 8])}, "encoder.token_grid: 8x8"),
        ({"encoder": ResamplerConfig(noise=[1.0, 0.0])}, "encoder.noise: has no effect"),
        ({"heads": 3}, "option heads: expected a divisor of width 16, found 3"),
        ({"codebook_size": 1}, "option codebook_size"),
        ({"decay": 1.0}, "option decay"),
        ({"image_size": 18}, "multiples of 4.*nearest is 16x16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(V2FlowError, match=message) as error:
        VQAutoencoder(vq_config(**options))
    assert "\n" not in str(error.value)


def test_pictures_and_ids_that_do_not_fit_are_refused(model: VQAutoencoder) -> None:
    with pytest.raises(V2FlowError, match=r"expected shape \[B, 3, 16, 16\], found \[2, 3, 16, 20\]"):
        model.encode(torch.zeros(2, 3, 16, 20))
    with pytest.raises(V2FlowError, match="empty batch"):
        model.encode(torch.zeros(0, 3, 16, 16))
    with pytest.raises(V2FlowError, match="from 0 to 31, found 0 to 32"):
        model.decode(torch.tensor([[0, 32, 0, 0, 0, 0, 0, 0]]))
    with pytest.raises(V2FlowError, match=r"shape \[B, 8\]"):
        model.decode(torch.zeros(1, 7, dtype=torch.long))
