"""Cached latents: what is stored is the codec's, builds survive kills and run in parallel, trainings do not notice."""

import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from core_toys import small_config
from data_toys import encode, write_tar
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors import safe_open
from safetensors.torch import load
from test_baseline import vq_config
from torch import Tensor

from v2flow.baselines.module import VQAutoencoderModule
from v2flow.baselines.pixel_losses import PixelLossConfig
from v2flow.cli import main
from v2flow.cli_data_latents import read_codec
from v2flow.codec import build_codec
from v2flow.config import CodecConfig, VelocityConfig
from v2flow.data import latents as latents_module
from v2flow.data.decode import BadSampleError
from v2flow.data.latents import LatentFormat, check_source, source_of, stored_format
from v2flow.data.latents_build import build_latents, split_of
from v2flow.data.manifest import read_manifest
from v2flow.data.shards import open_shards
from v2flow.errors import V2FlowError
from v2flow.training.data_module import ShardDataModule
from v2flow.training.metric_callbacks import ReconstructionCallback
from v2flow.training.module import ReconstructionModule
from v2flow.training.optimizer import OptimizerConfig
from v2flow.training.tokenizer_module import TokenizerModule

SIZES = (6, 6, 5)
CODEC = CodecConfig(patch_size=4)
FORM = LatentFormat("patch", source_of(CODEC, build_codec(CODEC), 16), "fp32", True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "cache"))


def write_pictures(folder: Path, split: str = "train", sizes: tuple[int, ...] = SIZES) -> str:
    """Shards of noise, 20 x 16 pixels, that say everything a sample can. Gives a glob."""
    rng = np.random.default_rng(len(split))
    for shard, size in enumerate(sizes):
        members = []
        for row in range(size):
            key, label = f"{split}{shard}{row}", str(row).encode()
            members.append((f"{key}.png", encode(rng.integers(0, 256, (16, 20, 3), np.uint8))))
            members += [(f"{key}.txt", b"a caption"), (f"{key}.json", b'{ "n": 1 }'), (f"{key}.cls", label)]
        write_tar(folder / f"{split}-{shard:06d}.tar", members)
    return str(folder / f"{split}-*.tar")


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def build(train: str, out: Path, **options: Any) -> dict[str, int] | None:
    options = {"dtype": "fp32", "batch_size": 4, "progress": False} | options
    return build_latents(options.pop("config", CODEC), options.pop("image_size", 16), train, out, **options)


@pytest.fixture(scope="module")
def whole(train: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed fp32 build of `train`."""
    out = tmp_path_factory.mktemp("whole") / "latents"
    assert build(train, out) == {"train": sum(SIZES)}
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def shown(train: str) -> dict[str, Tensor]:
    """Key -> picture [3, 16, 16], as a training decodes it."""
    loader = ShardDataModule(16, val=train, batch_size=5).val_dataloader()
    return {key: image for batch in loader for key, image in zip(batch["key"], batch["image"], strict=True)}


def batches(module: ShardDataModule, epochs: int = 1) -> list[dict[str, Any]]:
    loader = module.train_dataloader()
    return [batch for _ in range(epochs) for batch in loader]


# --- what is stored -----------------------------------------------------------------------------------------------


def test_samples_hold_the_codecs_latents_and_all_that_the_pictures_say(
    train: str, whole: Path, tmp_path: Path
) -> None:
    codec, pictures = build_codec(CODEC), shown(train)
    for original in sorted(Path(train).parent.glob("*.tar")):
        found, said = members(whole / original.name), members(original)
        assert found.keys() == {name.replace(".png", ".safetensors") for name in said}
        for name, data in found.items():
            key, extension = name.split(".")
            if extension != "safetensors":
                assert data == said[name]
                continue
            (name, tensor), *rest = load(data).items()
            views = torch.stack([pictures[key], pictures[key].flip(-1)])
            assert not rest and name == "latents" and torch.equal(tensor, codec.encode(views))
    facts, indexes = read_manifest((whole / "manifest.json").read_text(), "manifest")
    assert (facts["kind"], facts["codec"], facts["scale"], facts["dtype"]) == (
        "latents",
        "patch",
        4.0,
        "fp32",
    )
    assert [len(indexes[name]) for name in sorted(indexes)] == list(SIZES)
    (tmp_path / "one").write_bytes(found["train24.safetensors"])
    with safe_open(tmp_path / "one", "pt") as opened:  # by itself, far from its manifest
        described = json.loads(opened.metadata()["v2flow"])
        assert (
            described.items()
            >= {"codec": "patch", "codec_sha256": "", "scale": 4.0, "image_size": 16}.items()
        )


@pytest.mark.parametrize(("dtype", "bits"), [("fp16", 11), ("bf16", 8)])
def test_rounding_is_that_of_the_type(train: str, whole: Path, tmp_path: Path, dtype: str, bits: int) -> None:
    build(train, tmp_path / "out", dtype=dtype, flip=False)
    options: dict[str, Any] = {"batch_size": 17, "seed": 3}
    (rounded,) = batches(ShardDataModule(16, str(tmp_path / "out" / "*.tar"), **options))
    (exact,) = batches(ShardDataModule(16, str(whole / "*.tar"), **options))
    assert rounded["key"] == exact["key"] and rounded["latents"].dtype == torch.float32
    error = (rounded["latents"] - exact["latents"]).abs()
    assert error.max() > 0 and bool((error <= exact["latents"].abs() * 2.0**-bits + 1e-7).all())


def test_values_beyond_the_type_are_refused(train: str, tmp_path: Path) -> None:
    with pytest.raises(V2FlowError, match="'train00': latents beyond the range of fp16"):
        build(train, tmp_path / "out", config=replace(CODEC, scale=1e6), dtype="fp16")


@pytest.mark.parametrize("kind", ["dc", "kl"])
def test_a_frozen_autoencoders_latents(kind: str, train: str, tmp_path: Path) -> None:
    from diffusers import AutoencoderDC, AutoencoderKL

    torch.manual_seed(0)
    for name in ("vae", "other"):
        if kind == "kl":
            model = AutoencoderKL(
                down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
                block_out_channels=[8, 16], norm_num_groups=4, latent_channels=4,
            )  # fmt: skip
        else:
            model = AutoencoderDC(
                latent_channels=4, encoder_block_types=["ResBlock"] * 2, decoder_block_types=["ResBlock"] * 2,
                encoder_block_out_channels=[8, 16], decoder_block_out_channels=[8, 16],
                encoder_layers_per_block=[1, 1], decoder_layers_per_block=[1, 1],
                encoder_qkv_multiscales=[[], []], decoder_qkv_multiscales=[[], []],
            )  # fmt: skip
        model.save_pretrained(tmp_path / name)
    config = CodecConfig(kind=kind, path=str(tmp_path / "vae"), scale=0.5)  # type: ignore[arg-type]
    build(train, tmp_path / "out", config=config)
    module = ShardDataModule(16, str(tmp_path / "out" / "*.tar"), batch_size=8, flip=True)
    codec, pictures = build_codec(config), shown(train)
    (plain, mirrored) = (ShardDataModule(16, train, batch_size=8, flip=flip) for flip in (False, True))
    for cached, batch, reference in zip(*map(batches, (module, mirrored, plain)), strict=True):
        torch.testing.assert_close(cached["latents"], codec.encode(batch["image"]), rtol=1e-5, atol=1e-6)
        flipped = (batch["image"] != reference["image"]).flatten(1).any(1)
        turned = codec.encode(reference["image"]).flip(-1)[flipped]
        assert flipped.any() and not torch.allclose(cached["latents"][flipped], turned, atol=1e-3), (
            "an autoencoder's latents of a mirror image are not the mirror image of the latents"
        )
        assert batch["key"] == cached["key"] and all(key in pictures for key in batch["key"])
    assert module.latents is not None and module.latents.codec_name == "vae"
    other = replace(config, path=str(tmp_path / "other"))
    with pytest.raises(V2FlowError, match="SHA-256 of the codec's weights is"):
        check_source(module.latents.source, source_of(other, build_codec(other), 16))


# --- building: resumed, in parallel, refused ------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from v2flow.config import CodecConfig
from v2flow.data import latents_build as latents

calls, encode = 0, latents._encode
def encode_until_killed(*arguments):
    global calls
    calls += 1
    if calls == 6:  # three batches a shard: the middle of the second one is not written yet
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*arguments)

latents._encode = encode_until_killed
latents.build_latents(CodecConfig(patch_size=4), 16, sys.argv[1], sys.argv[2], dtype="fp32", batch_size=2)
"""


def test_a_killed_build_goes_on_where_it_was(train: str, tmp_path: Path) -> None:
    """A process of its own, killed while a shard is half written; `whole` has other batches, hence one of these."""
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, train, str(out)])
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in out.iterdir()) == [".building", "train-000000.tar"]
    assert list((out / ".building").rglob("*-*.tar")), "nothing was half written"
    with pytest.raises(V2FlowError, match=r"unfinished shards of other settings \(dtype\)"):
        build(train, out, dtype="fp16")
    before = (out / "train-000000.tar").stat()
    assert build(train, out, batch_size=2) == {"train": 17}
    after = (out / "train-000000.tar").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns), "kept, not built again"
    build(train, tmp_path / "undisturbed", batch_size=2)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_finished_build_is_kept_and_a_lost_shard_replaced(train: str, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(train, out)
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert build(train, out) == {"train": 17}
    assert stamps == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "train-000001.tar").unlink()
    with (out / "train-000002.tar").open("r+b") as file:
        file.truncate(5000)
    assert build(train, out) == {"train": 17}
    assert contents(out) == contents(whole)
    assert (out / "train-000000.tar").stat().st_mtime_ns == stamps["train-000000.tar"]
    with pytest.raises(V2FlowError, match=r"built with other settings \(flip\)"):
        build(train, out, flip=False)


def test_two_slurm_tasks_at_once_build_what_one_builds(train: str, whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "v2flow", "data", "latents", "--data", train, "--out", str(tmp_path / "out"),
               "--codec", "patch", "--patch-size", "4", "--image-size", "16", "--dtype", "fp32", "--batch-size", "4",
               "--device", "cpu"]  # fmt: skip
    running = [
        subprocess.Popen(command, env=os.environ | {"SLURM_PROCID": str(task), "SLURM_NTASKS": "2"})
        for task in range(2)
    ]
    assert [process.wait(timeout=240) for process in running] == [0, 0]
    assert contents(tmp_path / "out") == contents(whole)


def test_slurm_tasks_one_after_the_other(
    train: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert build(train, tmp_path / "out") is None
    assert [path.name for path in sorted(tmp_path.glob("out/*.tar"))] == ["train-000001.tar"]
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert build(train, tmp_path / "out") == {"train": 17}
    assert contents(tmp_path / "out") == contents(whole)
    monkeypatch.setenv("SLURM_PROCID", "2")
    with pytest.raises(
        V2FlowError, match="SLURM_PROCID and SLURM_NTASKS: expected 0 <= task < tasks, found 2 and 2"
    ):
        build(train, tmp_path / "out")


def test_workers_build_what_one_process_builds(train: str, whole: Path, tmp_path: Path) -> None:
    assert build(train, tmp_path / "out", workers=2) == {"train": 17}
    assert contents(tmp_path / "out") == contents(whole)


def test_a_bad_picture_is_one_line_and_finished_shards_are_kept(train: str, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    write_pictures(pictures, sizes=(2, 2))
    write_tar(pictures / "train-000001.tar", [("a.png", b"no picture")])
    with pytest.raises(V2FlowError, match="sample 'a': not a JPEG, PNG or WebP picture") as caught:
        build(str(pictures / "*.tar"), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in sorted(tmp_path.glob("out/*"))] == [".building", "train-000000.tar"]


def test_splits_are_words_of_file_names_and_shards_keep_their_order(tmp_path: Path) -> None:
    assert split_of("pipe:cat x/imagenet1k-train-0001.tar") == "train"
    assert split_of("a/imagenet1k-validation-07.tar") == split_of("https://x/val_3.tar") == "val"
    for name in ("s-0.tar", "train/pictures.tar", "train-of-test-1.tar", "training-0.tar"):
        with pytest.raises(V2FlowError, match="one of the words train, val"):
            split_of(name)
    first, second = (write_pictures(tmp_path / split, split, (2, 1)) for split in ("train", "val"))
    assert build([first, second], tmp_path / "out") == {"train": 3, "val": 1 + 2}
    shards = open_shards(str(tmp_path / "out" / "*.tar"))
    assert [shards.key(i) for i in (0, 2, 3, 5)] == ["train00", "train10", "val00", "val10"]
    twin = write_pictures(tmp_path / "twin", sizes=(1,))
    with pytest.raises(V2FlowError, match="two samples of the key 'train00'"):
        build([first, twin], tmp_path / "twins")


# --- reading ------------------------------------------------------------------------------------------------------


def damaged(whole: Path, folder: Path, change: Callable[[bytes], bytes]) -> str:
    """A copy of a build in which one member of the first shard was changed in place. Gives a glob."""
    folder.mkdir()
    for name, data in contents(whole).items():
        (folder / name).write_bytes(data)
    _, indexes = read_manifest((whole / "manifest.json").read_text(), "manifest")
    offset, size = indexes["train-000000.tar"].members[2, 0].tolist()
    with (folder / "train-000000.tar").open("r+b") as file:
        file.seek(offset)
        old = file.read(size)
        new = change(old)
        file.seek(offset)
        file.write(new + b"\0" * (size - len(new)))
    return str(folder / "*.tar")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a member was unpickled",)


@pytest.mark.parametrize(("change", "reason"), [
    (lambda old: old[:-1] + bytes([old[-1] ^ 1]), "cut short or damaged, the checksum is wrong"),
    (lambda old: old.replace(b": 4.0", b": 4.1"), "of another codec, type or shape than the manifest says"),
    (lambda old: old.replace(b"F32", b"I32"), "of another codec, type or shape"),
    (lambda old: b"\xff" * 8 + old[8:], "not a safetensors file"),
    (lambda old: pickle.dumps(Bomb()), "not a safetensors file"),
    (lambda old: (3000).to_bytes(8, "little") + b"[" * 3000, "not a safetensors file"),
])  # fmt: skip
def test_a_damaged_member_is_refused(
    whole: Path, tmp_path: Path, change: Callable[[bytes], bytes], reason: str
) -> None:
    shards = damaged(whole, tmp_path / "bad", change)
    strict = ShardDataModule(16, shards, batch_size=17, max_bad_samples=0)
    with pytest.raises(V2FlowError, match=f"train-000000.tar, sample 'train02': latents: {reason}") as caught:
        batches(strict)
    assert "\n" not in str(caught.value)
    (batch,) = batches(ShardDataModule(16, shards, batch_size=17))
    assert "train02" not in batch["key"] and len(set(batch["key"])) == 16, "the next one stands in for it"


def test_a_header_beyond_all_bounds_is_not_read(whole: Path) -> None:
    data = (10**9).to_bytes(8, "little") + b"{" + b" " * 10**5
    with pytest.raises(BadSampleError, match="not a safetensors file"):
        FORM.unpack(data)
    shards = open_shards(str(whole / "*.tar"))
    shards.shards[1].index.members[0, 0, 1] = 10**12
    with pytest.raises(
        V2FlowError, match="train-000001.tar: expected latents of 6144 bytes, found a member of 1000"
    ):
        latents_module.LatentReader(shards, FORM)


def test_manifests_that_do_not_say_enough_are_refused(whole: Path, tmp_path: Path) -> None:
    def with_build(**changes: Any) -> str:
        folder = Path(damaged(whole, tmp_path / str(len(list(tmp_path.iterdir()))), lambda old: old)).parent
        document = json.loads((folder / "manifest.json").read_text())
        document["build"] = {k: v for k, v in (document["build"] | changes).items() if v is not None}
        (folder / "manifest.json").write_text(json.dumps(document))
        return str(folder / "*.tar")

    for changes in (
        {"scale": None}, {"dtype": "int4"}, {"downsample": 0}, {"channels": "many"}, {"codec": ["x"]},
        {"codec_sha256": {}}, {"scale": [1.0]}, {"dtype": ["fp32"]}, {"codec_name": {}}, {"image_size": 16.0},
    ):  # fmt: skip
        with pytest.raises(V2FlowError, match="build them again") as caught:
            stored_format(open_shards(with_build(**changes)))
        assert "\n" not in str(caught.value)
    with pytest.raises(V2FlowError, match="not cached latents of one codec and type"):
        stored_format(open_shards([str(whole / "*.tar"), with_build(scale=2.0)]))


def test_the_data_module_refuses_what_latents_do_not_serve_for(
    train: str, whole: Path, tmp_path: Path
) -> None:
    cached, pictures = str(whole / "*.tar"), write_pictures(tmp_path / "val", "val", (3,))
    build(train, tmp_path / "plain", flip=False)
    for options, expected in (
        ({"train": cached, "crop": "random"}, "data.crop: expected center with cached latents"),
        (
            {"train": str(tmp_path / "plain" / "*.tar"), "flip": True},
            "data.flip: the cached latents have none",
        ),
        ({"train": train, "val": cached}, "data.val: expected pictures, which the metrics need"),
        ({"train": [cached, train]}, "not cached latents of one codec"),
    ):
        with pytest.raises(V2FlowError, match=expected) as caught:
            ShardDataModule(16, **options).setup("fit")  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    module = ShardDataModule(16, cached, pictures, flip=True)
    module.setup("fit")
    assert {"image", "valid"} <= next(iter(module.val_dataloader())).keys()


# --- training -----------------------------------------------------------------------------------------------------


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


def fit(module: ReconstructionModule, folder: Path, shards: str, **data: Any) -> list[float]:
    losses = Losses()
    trainer = Trainer(
        max_steps=5, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, callbacks=[losses],
    )  # fmt: skip
    options: dict[str, Any] = {"image_size": 16, "batch_size": 4, "flip": True, "seed": 5}
    trainer.fit(module, datamodule=ShardDataModule(train=shards, **options | data))
    return losses.values


def tokenizer_module(**parts: Any) -> TokenizerModule:
    return TokenizerModule(small_config(**parts), OptimizerConfig(total_steps=8, warmup_steps=1), seed=2)


def vq_module() -> VQAutoencoderModule:
    return VQAutoencoderModule(vq_config(), OptimizerConfig(total_steps=8, warmup_steps=1), seed=2)


QUIET = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
quiet = lambda test: QUIET[0](QUIET[1](QUIET[2](test)))  # noqa: E731


@quiet
@pytest.mark.parametrize("make", [tokenizer_module, vq_module])
def test_a_training_on_latents_is_that_on_pictures_bit_for_bit(
    train: str, whole: Path, tmp_path: Path, make: Callable[[], ReconstructionModule]
) -> None:
    one, two, plain = make(), make(), make()
    losses = fit(one, tmp_path, train)
    assert fit(two, tmp_path, str(whole / "*.tar")) == losses and len(set(losses)) == 5
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    pictures, latents = (ShardDataModule(16, name) for name in (train, str(whole / "*.tar")))
    assert pictures.train_batches().facts == latents.train_batches().facts, "one can resume with the other"
    assert fit(plain, tmp_path, train, flip=False) != losses, "mirror images would not be missed"


@quiet
@pytest.mark.parametrize(("parts", "image_size", "expected"), [
    ({"codec": CodecConfig(patch_size=2), "velocity": VelocityConfig(width=16, depth=1, heads=2, fine_patch=2)},
     16, "the patch size, or pixels a latent, is 4 .* and 2 in the experiment"),
    ({"codec": CodecConfig(patch_size=4, scale=2.0)}, 16, "the codec's scale is 4.0 .* and 2.0 in"),
    ({"codec": CodecConfig(patch_size=4, shift=0.0)}, 16, "the codec's shift is 0.5 .* and 0.0 in"),
    ({"image_size": 32}, 32, "the image size is 16 in the cached latents and 32 in the experiment"),
])  # fmt: skip
def test_latents_of_another_codec_are_refused_before_training(
    whole: Path, tmp_path: Path, parts: dict[str, Any], image_size: int, expected: str
) -> None:
    module = tokenizer_module(**parts)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(V2FlowError, match=f"option data.train: {expected}") as caught:
        fit(module, tmp_path, str(whole / "*.tar"), image_size=image_size)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_kind_of_codec_is_compared_first() -> None:
    with pytest.raises(V2FlowError, match="the codec's kind is kl in the cached latents and patch in"):
        check_source(replace(FORM.source, codec="kl", scale=1.0), FORM.source)
    check_source(FORM.source, replace(FORM.source))


@quiet
def test_losses_on_pixels_need_pictures(whole: Path, tmp_path: Path) -> None:
    options = PixelLossConfig(perceptual=1.0)
    module = VQAutoencoderModule(vq_config(), OptimizerConfig(total_steps=8), pixel_losses=options)
    with pytest.raises(V2FlowError, match="found cached latents, but option pixel_losses needs pictures"):
        fit(module, tmp_path, str(whole / "*.tar"))


@quiet
def test_floors_need_pictures(whole: Path) -> None:
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.datamodule = ShardDataModule(16, str(whole / "*.tar"))
    with pytest.raises(
        V2FlowError, match="option floors: expected training shards of pictures, found cached latents"
    ):
        ReconstructionCallback(floors=True).setup(trainer, tokenizer_module(), "fit")


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_takes_the_codec_of_an_experiment(
    train: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = tmp_path / "experiment.yaml"
    tokenizer = {"image_size": 16, "codec": {"patch_size": "${oc.decode:${oc.env:TOY_PATCH,4}}"}}
    experiment.write_text(yaml.safe_dump({"model": {"init_args": {"tokenizer": tokenizer}}}))
    words = ["data", "latents", "--data", train, "--out", str(tmp_path / "out"), "--dtype", "fp32"]
    by_config = [
        *words,
        "--config",
        str(experiment),
        "--batch-size",
        "4",
        "--json",
        str(tmp_path / "counts.json"),
    ]
    assert main(by_config) == 0
    assert capsys.readouterr().out == f"17 train: {tmp_path / 'out'}\n"
    assert json.loads((tmp_path / "counts.json").read_text()) == {"samples": {"train": 17}, "complete": True}
    assert contents(tmp_path / "out") == contents(whole)
    for more, expected in (
        ([], "expected --config EXPERIMENT, or --codec and --image-size"),
        (["--config", str(experiment), "--scale", "2"], "option --scale: expected none beside --config"),
        (["--codec", "kl", "--image-size", "16"], "option codec.path: kind 'kl' needs"),
        (["--codec", "patch", "--image-size", "18"], "image size 18x18"),
        (
            ["--codec", "patch", "--image-size", "16", "--device", "abacus"],
            "option device: expected one of this machine's",
        ),
        (["--codec", "patch", "--image-size", "16", "--workers", "0"], "option workers: expected at least 1"),
        (["--config", train.replace("*", "000000")], "expected an experiment file|UTF-8|null byte"),
    ):
        assert main([*words, *more]) == 2
        said = capsys.readouterr().err
        assert any(part in said for part in expected.split("|")) and said.count("\n") == 1


def test_every_shipped_tokenizer_experiment_names_its_codec(repository: Path) -> None:
    found = {
        path.stem: read_codec(path) for path in (repository / "experiments" / "tokenizer").glob("*.yaml")
    }
    assert found["cifar10-32"] == found["cifar10-32-vq"]
    config, size = found["reference-1024"]
    assert (config.kind, config.scale, size) == ("dc", 0.41407, 1024)
    with pytest.raises(V2FlowError, match="expected an experiment file with a tokenizer or autoencoder"):
        read_codec(repository / "experiments" / "t2i" / "shapes-32.yaml")
