"""The encoder as a program: the ids of `encode`, in a process that has no v2flow, and out of parts of a vocabulary."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from core_toys import pictures, small_config

from v2flow.cli import main
from v2flow.config import CodecConfig, ResamplerConfig, VelocityConfig
from v2flow.encoder_export import EncoderProgram, expected_rows, most_probable, save_encoder
from v2flow.encoding import double_ids
from v2flow.tokenizer import V2FlowTokenizer
from v2flow.vocabulary_logits import Logits

BATCHES = (1, 2, 7)
ALONE = """
import sys
for name in ("v2flow", "diffusers", "transformers"):
    sys.modules[name] = None  # importing one is an error
import torch
for path in sys.argv[2:]:
    pictures, ids = torch.load(path + "/case.pt", weights_only=True)
    program = torch.export.load(path + "/encoder.pt2").module()
    for batch in map(int, sys.argv[1].split()):
        found = program(pictures[:batch])
        assert found.dtype == torch.int64 and torch.equal(found, ids[:batch]), (path, batch)
    try:
        program(pictures[:, :, :-1])
    except Exception:
        continue
    raise SystemExit(path + ": took pictures of another size")
print("equal")
"""


def small_model(codec: CodecConfig | None = None, **resampler: object) -> V2FlowTokenizer:
    """A tokenizer whose codes are tokens of some pictures, so that others get many different ids."""
    torch.manual_seed(0)
    given = {"width": 16, "depth": 1, "token_grid": [4, 2], "key_dim": 8} | resampler
    config = small_config(
        codec=codec or CodecConfig(patch_size=4), resampler=ResamplerConfig(**given),
        velocity=VelocityConfig(width=16, depth=1, heads=2, fine_patch=1),
    )  # fmt: skip
    model = V2FlowTokenizer(config).eval()
    tokens = model.encode(pictures(32, seed=5), return_soft=True).embeddings.flatten(0, 1)
    model.visual_vocabulary.codes.copy_(torch.nn.functional.normalize(tokens[::8], dim=-1))
    return model


def autoencoder(folder: Path) -> CodecConfig:
    """A real (tiny) AutoencoderKL."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
    ).save_pretrained(folder)  # fmt: skip
    return CodecConfig(kind="kl", path=str(folder), scale=0.5)


READOUTS = {
    "keys": {"temperature": [1.0, 0.5]},
    "linear": {"readout": "linear"},
    "none": {"readout": "none"},
    "hard": {"readout": "linear", "hard": True},
}


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 60 words of the vocabulary are looked at 16 at a time."""
    monkeypatch.setattr("v2flow.encoder_export.COLUMNS", 16)


@pytest.mark.slow
@pytest.mark.usefixtures("in_parts")
def test_plain_torch_gives_the_same_ids_in_a_process_without_v2flow(tmp_path: Path) -> None:
    """With the patch codec (exported by the command), an AutoencoderKL, and hard tokens; for several batches."""
    codec = autoencoder(tmp_path / "autoencoder")
    models = {"patch": small_model(), "kl": small_model(codec), "hard": small_model(**READOUTS["hard"])}
    models["patch"].save_pretrained(tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "patch"), "--encoder"]) == 0
    for name, model in models.items():
        if name != "patch":
            save_encoder(model, tmp_path / name)
        images = pictures(max(BATCHES), seed=9)
        ids = model.encode(images)
        assert len(ids.unique()) > 5
        torch.save((images, ids), tmp_path / name / "case.pt")
    sizes = " ".join(map(str, BATCHES))
    command = [sys.executable, "-I", "-c", ALONE, sizes, *(str(tmp_path / name) for name in models)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("name", READOUTS)
def test_every_readout_gives_the_ids_of_double_precision(name: str) -> None:
    model = small_model(**READOUTS[name])
    images = pictures(96, seed=7)
    with torch.no_grad():
        ids = EncoderProgram(model)(images)
    latents = model.codec.encode(images)
    assert torch.equal(ids, double_ids(model.resampler, model.visual_vocabulary.codes, latents))
    assert torch.equal(ids, model.encode(images)) and len(ids.unique()) > 5


def test_a_program_with_other_ids_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_model().save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(
        EncoderProgram, "forward", lambda self, images: images[:, 0, :2, :4].flatten(1).long() - 1
    )
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "exported"), "--encoder"]) == 2
    error = capsys.readouterr().err
    assert "expected the ids of encode" in error and "found 24 others among 24" in error
    assert error.count("\n") == 1 and not (tmp_path / "exported").exists()


def test_running_softmax_is_the_softmax_where_logits_are_far_apart() -> None:
    """Whatever the parts, with logits whose exponentials overflow, and with equal ones."""
    queries = torch.randn(3, 5, 4, dtype=torch.float64) * 300
    keys, bias, values = torch.randn(50, 4), torch.randn(50), torch.randn(50, 6)
    keys[40] = keys[7]
    logits = Logits(queries, keys, bias, temperature=0.5)
    scores = (queries @ keys.double().T + bias.double()) / 0.5
    expected = scores.softmax(-1) @ values.double()
    assert scores.abs().max() > 1000
    for columns in (1, 7, 50, 64):
        torch.testing.assert_close(expected_rows(logits, values, columns), expected)
        assert torch.equal(most_probable(logits, columns), scores.argmax(-1))
    same = Logits(torch.ones(1, 4, dtype=torch.float64), torch.ones(50, 4))
    assert most_probable(same, 7).tolist() == [0]
