"""Perceptual and adversarial losses of the baselines: the discriminator, its weight, training, resuming, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from core_toys import pictures
from lightning.pytorch import Callback, LightningModule, Trainer
from test_baseline import Recorder, equal_states, fit, loopback, vq_config  # noqa: F401
from torch import nn
from torchvision.models import alexnet
from training_toys import experiment, write, write_shards

from v2flow.baselines.adversarial import Adversary, PatchDiscriminator, adaptive_weight
from v2flow.baselines.module import VQAutoencoderModule
from v2flow.baselines.pixel_losses import PixelLossConfig
from v2flow.cli import main
from v2flow.config import CodecConfig
from v2flow.errors import V2FlowError
from v2flow.metrics import extractors
from v2flow.training.checkpoint import load_model
from v2flow.training.ema import EMACallback
from v2flow.training.health import HealthCallback
from v2flow.training.optimizer import OptimizerConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*resumed from a checkpoint that ended before the epoch ended"),
]

CPU = torch.device("cpu")


def adversary(lr: float = 2e-3, seed: int = 0) -> Adversary:
    return Adversary(image_size=16, width=8, depth=1, lr=lr, device=CPU, seed=seed)


def make_module(total_steps: int = 4, image_size: int = 16, **losses: Any) -> VQAutoencoderModule:
    small = {"discriminator_width": 8, "discriminator_depth": 1, "adversarial_ramp": 1}
    return VQAutoencoderModule(
        vq_config(image_size=image_size), OptimizerConfig(total_steps=total_steps, warmup_steps=1), seed=1,
        pixel_losses=PixelLossConfig(**(small | losses)),
    )  # fmt: skip


# --- the discriminator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_verdict_is_on_a_patch_of_the_stated_size(depth: int, patch: int) -> None:
    """By the pixels that the gradient of one verdict reaches. Group norms look at the whole picture: left out here."""
    network = PatchDiscriminator(8, depth)
    for index, part in enumerate(network):
        if isinstance(part, nn.GroupNorm):
            network[index] = nn.Identity()
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    verdicts = network(image)
    assert verdicts.shape[:2] == (1, 1)
    row = verdicts.shape[-1] // 2
    verdicts[0, 0, row, row].backward()
    assert image.grad is not None
    reached = image.grad.abs().sum((0, 1))
    assert int((reached.sum(0) > 0).sum()) == int((reached.sum(1) > 0).sum()) == patch


def test_a_verdict_does_not_depend_on_the_other_pictures() -> None:
    network, images = PatchDiscriminator(8, 2), pictures(4)
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]))


def test_hinge_loss_by_hand() -> None:
    """Verdicts of 0.25 on everything: (1 − 0.25 + 1 + 0.25) / 2 = 1; of 3: (0 + 4) / 2."""
    for verdict, expected in ((0.25, 1.0), (3.0, 2.0)):
        judge = adversary(lr=1e-9)
        last = judge.discriminator[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        with torch.no_grad():
            last.weight.zero_()
            last.bias.fill_(verdict)
        assert judge.loss(pictures(2)).item() == pytest.approx(-verdict)
        assert judge.step(pictures(2), pictures(2, seed=1)).item() == pytest.approx(expected)


def test_the_discriminator_learns_to_tell_pictures_apart() -> None:
    """Smooth pictures from the same ones with noise; on pictures that it has not seen."""
    judge, noise = adversary(), torch.Generator().manual_seed(0)

    def noisy(images: torch.Tensor) -> torch.Tensor:
        return images + 0.2 * torch.randn(images.shape, generator=noise)

    losses = []
    for step in range(60):
        losses.append(judge.step(pictures(16, seed=step), noisy(pictures(16, seed=step))).item())
    assert losses[0] > 0.8 and losses[-1] < 0.2
    unseen = pictures(16, seed=999)
    assert judge.loss(unseen) < -0.8 and judge.loss(noisy(unseen)) > 0.8


def test_the_models_side_moves_pictures_alone() -> None:
    judge = adversary()
    images = pictures(2).requires_grad_()
    judge.loss(images).backward()
    assert images.grad is not None and images.grad.any()
    assert all(p.grad is None for p in judge.discriminator.parameters())
    fake = pictures(2).requires_grad_()
    before = [p.clone() for p in judge.discriminator.parameters()]
    judge.step(images, fake)
    assert fake.grad is None
    assert not any(map(torch.equal, before, judge.discriminator.parameters()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pictures_that_are_not_finite_are_no_step(value: float) -> None:
    """Neither weights nor moments change, and training goes on as if they had not come."""
    judge, other = adversary(), adversary()
    for step in range(4):
        judge.step(pictures(4, seed=step), pictures(4, seed=step + 50))
        other.step(pictures(4, seed=step), pictures(4, seed=step + 50))
        judge.step(pictures(4), torch.full((4, 3, 16, 16), value))
    assert equal_states(judge.discriminator.state_dict(), other.discriminator.state_dict())
    moments = [one.optimizer.state_dict()["state"] for one in (judge, other)]
    assert all(equal_states(moments[0][number], moments[1][number]) for number in moments[1])


def test_adaptive_weight_makes_gradients_equal() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    out = layer(torch.randn(4, 5))
    losses = out.square().mean(), 0.01 * out.abs().sum()
    weight = adaptive_weight(*losses, layer.weight)
    assert not weight.requires_grad
    one, other = (torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in losses)
    torch.testing.assert_close((weight * other).norm(), one.norm(), rtol=1e-4, atol=0)
    assert adaptive_weight(losses[0], 0.0 * out.sum(), layer.weight) == 1e4


def test_ramp_by_hand() -> None:
    config = PixelLossConfig(adversarial=0.5, adversarial_start=10, adversarial_ramp=4)
    assert [config.ramp(step) for step in (0, 9, 10, 11, 13, 14, 500)] == [0, 0, 0.2, 0.4, 0.8, 1, 1]
    assert PixelLossConfig(adversarial=1.0, adversarial_ramp=0).ramp(0) == 1
    assert PixelLossConfig(perceptual=1.0).ramp(1000) == 0


# --- training under Lightning -----------------------------------------------------------------------------------


class Watch(Callback):
    """Norms of the model's gradients as its optimiser saw them, and every figure of each step."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.figures: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        gradients = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(torch.stack(gradients).norm().item())
        self.figures.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def test_steps_are_the_models_and_gradients_are_clipped(tmp_path: Path) -> None:
    """`max_steps` counts the model's steps, of which there are as many as the discriminator's."""
    watch, module = Watch(), make_module(adversarial=30.0)
    trainer = fit(module, tmp_path, watch)
    assert trainer.global_step == 4 and len(watch.norms) == 4
    assert max(watch.norms) == pytest.approx(3.0, rel=1e-4)  # the clip of `fit`
    assert module._pixels is not None and module._pixels.adversary is not None
    states = module._pixels.adversary.optimizer.state.values()
    assert [int(state["step"]) for state in states] == [4] * len(states) and len(states) > 4
    assert all(
        {"train/discriminator", "train/adversarial", "train/adaptive_weight"} <= f.keys()
        for f in watch.figures
    )
    weights = [figures["train/adaptive_weight"] for figures in watch.figures]
    assert all(0 < weight <= 1e4 for weight in weights) and len(set(weights)) == 4


def test_the_terms_add_up_to_the_loss(tmp_path: Path) -> None:
    watch = Watch()
    fit(make_module(adversarial=0.5, adversarial_ramp=1), tmp_path, watch)
    for step, f in enumerate(watch.figures):
        ramp = [0.5, 1.0, 1.0, 1.0][step]
        extra = 0.5 * ramp * f["train/adaptive_weight"] * f["train/adversarial"]
        assert f["train/loss"] == pytest.approx(f["train/mean"] + f["train/quantizer"] + extra, rel=1e-5)


def test_until_it_starts_nothing_is_different(tmp_path: Path) -> None:
    """The same figures, bit for bit, up to the step at which the discriminator starts."""
    plain, late = Recorder(), Recorder()
    fit(make_module(), tmp_path, plain)
    fit(make_module(adversarial=1.0, adversarial_start=2), tmp_path, late)
    assert plain.losses[:2] == late.losses[:2] and plain.losses[2] != late.losses[2]
    assert late.untouched == [True] * 4
    stages = make_module(adversarial=1.0, adversarial_start=1).training_stages()
    assert stages == {"reconstruction": (0.0, 0.25), "adversarial": (0.25, 1.0)}


class SpoilBatch(Callback):
    """The second batch has a picture that is not finite."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            batch["image"] = batch["image"].clone()
            batch["image"][0] = float("nan")


def test_one_bad_batch_spoils_neither_side(tmp_path: Path) -> None:
    """One step is left out, and those after it are made."""
    module, health = make_module(adversarial=1.0), HealthCallback()
    trainer = fit(module, tmp_path, health, SpoilBatch())
    assert health.state_dict()["skipped"] == 1 and trainer.global_step == 4
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    for state in (checkpoint["adversary"]["discriminator"], checkpoint["state_dict"]):
        assert all(value.isfinite().all() for value in state.values())
    assert checkpoint["adversary"]["optimizer"]["state"][0]["step"] == 3


def test_the_discriminator_is_no_part_of_the_model(tmp_path: Path) -> None:
    plain, adversarial = make_module(), make_module(adversarial=1.0)
    fit(plain, tmp_path)
    trainer = fit(adversarial, tmp_path, EMACallback())
    assert plain.state_dict().keys() == adversarial.state_dict().keys()
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    model, info = load_model(tmp_path / "end.ckpt")
    ids = adversarial.model.encode(pictures(3))
    assert torch.equal(model.decode(ids), adversarial.model.decode(ids))
    assert info["pixel_losses"]["adversarial"] == 1.0


def test_a_resumed_training_equals_one_in_a_piece(tmp_path: Path) -> None:
    """The discriminator and its optimiser included; it starts before the resume."""
    whole, rest = Recorder(), Recorder()
    options = {"adversarial": 0.8, "adversarial_start": 1}
    trainers = [fit(make_module(**options), tmp_path, EMACallback(), whole)]
    fit(make_module(**options), tmp_path, EMACallback(), steps=2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = make_module(**options)
    trainers.append(fit(resumed, tmp_path, EMACallback(), rest, resume=tmp_path / "half.ckpt"))
    assert rest.losses == whole.losses[2:]
    checkpoints = []
    for i, trainer in enumerate(trainers):
        trainer.save_checkpoint(tmp_path / f"{i}.ckpt")
        checkpoints.append(torch.load(tmp_path / f"{i}.ckpt", weights_only=True))
    for key in ("state_dict", "current_model_state"):
        assert equal_states(checkpoints[0][key], checkpoints[1][key])
    discriminators = [checkpoint["adversary"]["discriminator"] for checkpoint in checkpoints]
    assert equal_states(*discriminators)
    half = torch.load(tmp_path / "half.ckpt", weights_only=True)["adversary"]["discriminator"]
    assert not equal_states(half, discriminators[0])


def test_a_resume_with_other_losses_is_refused(tmp_path: Path) -> None:
    fit(make_module(), tmp_path, steps=2).save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(
        V2FlowError, match="pixel_losses.adversarial is 0.0 in the checkpoint and 1.0 in this"
    ):
        fit(make_module(adversarial=1.0), tmp_path, resume=tmp_path / "half.ckpt")


def test_checkpoints_that_do_not_speak_of_losses_had_none(tmp_path: Path) -> None:
    """Those of the time before there were any."""
    whole, rest = Recorder(), Recorder()
    fit(make_module(), tmp_path, whole)
    fit(make_module(), tmp_path, steps=2).save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    del checkpoint["v2flow"]["pixel_losses"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    fit(make_module(), tmp_path, rest, resume=tmp_path / "old.ckpt")
    assert rest.losses == whole.losses[2:]


# --- LPIPS ------------------------------------------------------------------------------------------------------


def test_perceptual_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused without its weights; with weights in place it is a loss that training follows."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    module = make_module(perceptual=2.0, image_size=32, total_steps=3)
    with pytest.raises(
        V2FlowError, match=r"pixel_losses.perceptual: .*alexnet-owt-.* not found: download http"
    ):
        module._pixel_networks(CPU)
    file = tmp_path / "hub" / "checkpoints" / extractors.LPIPS_FILE
    file.parent.mkdir(parents=True)
    torch.save(alexnet(weights=None).state_dict(), file)
    with pytest.raises(V2FlowError, match="damaged or another file"):
        module._pixel_networks(CPU)
    monkeypatch.setattr(extractors, "weights_problem", lambda path, name: None if path == file else "none")

    images = pictures(4, size=32)
    module.model.eval()  # so that the codebook stays as it is
    terms = module.training_losses(images, 0.0, torch.Generator().manual_seed(0))
    expected = terms["mean"] + terms["quantizer"] + 2 * terms["perceptual"]
    torch.testing.assert_close(terms["loss"], expected)
    (gradient,) = torch.autograd.grad(terms["perceptual"], module.model.output.weight, retain_graph=True)
    assert gradient.any()
    with torch.no_grad():
        network = extractors.lpips(32)
        assert isinstance(network, nn.Module)
        pixels = module.model.codec.decode(module.model(images)[2])
        distance = network(images, pixels, normalize=True).mean()
    assert distance.item() == pytest.approx(terms["perceptual"].item(), rel=1e-5) and distance > 0
    assert not [name for name in module.state_dict() if "lpips" in name]


# --- the command line -------------------------------------------------------------------------------------------


def test_it_trains_through_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = experiment(write_shards(tmp_path), tmp_path)
    config["model"] = {
        "class_path": "v2flow.baselines.module.VQAutoencoderModule",
        "init_args": {
            "seed": "${...seed_everything}",
            "autoencoder": {
                "image_size": 16, "encoder": {"width": 8, "depth": 1, "token_grid": [4, 4]},
                "codebook_size": 32, "width": 16, "heads": 2, "depth": 1,
            },
            "optimizer": {"total_steps": 2, "warmup_steps": 1},
            "pixel_losses": {"adversarial": 0.5, "discriminator_width": 8, "discriminator_depth": 1},
        },
    }  # fmt: skip
    words = ["fit", "--config", write(config, tmp_path / "e.yaml")]
    assert main(words) == 0
    path = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == 2 and len(checkpoint["optimizer_states"]) == 1
    assert checkpoint["adversary"]["optimizer"]["state"][0]["step"] == 2

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    capsys.readouterr()
    assert main([*words, "--model.init_args.pixel_losses.perceptual=1"]) == 2
    (line,) = [ln for ln in capsys.readouterr().err.splitlines() if ln.startswith("v2flow: error: ")]
    assert "option pixel_losses.perceptual: pictures of 16 px are smaller than the 32 px" in line


# --- two processes ----------------------------------------------------------------------------------------------


def train_rank(rank: int, folder: str) -> None:
    """One of two gloo processes: three steps of the discriminator, each on its half of the pictures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    judge = adversary()
    for step in range(3):
        judge.step(pictures(8, seed=step)[rank::2], pictures(8, seed=step + 50)[rank::2])
        if rank == 1:  # a picture of one rank is no step of either
            judge.step(pictures(4), torch.full((4, 3, 16, 16), float("nan")))
        else:
            judge.step(pictures(4), pictures(4, seed=1))
    x = torch.full((3,), 1.0 + rank, requires_grad=True)
    weight = adaptive_weight(x.square().sum(), x.sum(), x)
    torch.save((judge.discriminator.state_dict(), weight), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_with_the_joint_batch(tmp_path: Path) -> None:
    judge = adversary()
    for step in range(3):
        judge.step(pictures(8, seed=step), pictures(8, seed=step + 50))
    torch.multiprocessing.spawn(train_rank, (str(tmp_path),), nprocs=2)
    (first, weight), (second, other) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert equal_states(first, second) and weight == other
    # The gradient of x² is 2x: weights of 2 and 4, by the rank.
    torch.testing.assert_close(weight, torch.tensor(3.0))
    for name, value in judge.discriminator.state_dict().items():
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-4)


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perceptual": -1.0}, "option pixel_losses.perceptual: expected a weight >= 0, found -1.0"),
        ({"adversarial": -0.1}, "option pixel_losses.adversarial: expected a weight >= 0"),
        ({"adversarial": 1.0, "adversarial_start": 4}, "before total_steps=4, found 4"),
        ({"adversarial": 1.0, "discriminator_width": 12}, "discriminator_width: expected a multiple of 8"),
        ({"adversarial": 1.0, "discriminator_depth": 3}, "discriminator_depth: 3 halvings need .* 24 px"),
        ({"adversarial": 1.0, "discriminator_depth": 0}, "discriminator_depth: expected at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(V2FlowError, match=message) as error:
        make_module(**options)._pixel_networks(CPU)
    assert "\n" not in str(error.value)


def test_frozen_autoencoders_are_refused() -> None:
    """Before theirs is loaded: no gradient goes through one."""
    config = vq_config(codec=CodecConfig(kind="kl", path="nowhere"))
    with pytest.raises(V2FlowError, match="option pixel_losses: expected codec.kind=patch, found 'kl'"):
        VQAutoencoderModule(config, pixel_losses=PixelLossConfig(adversarial=1.0))
