"""Codecs: exact patches, real diffusers autoencoders, clear refusals."""

import copy
from pathlib import Path
from typing import Literal

import pytest
import torch

from v2flow.cli import build_parser
from v2flow.codec import build_codec
from v2flow.config import CodecConfig
from v2flow.errors import V2FlowError


def test_patches_are_put_where_a_plain_loop_puts_them() -> None:
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    codec = build_codec(CodecConfig(patch_size=4, scale=4.0, shift=0.5))
    latents = codec.encode(images)
    assert latents.shape == (2, *codec.latent_shape(8, 12))
    for row in range(2):
        for column in range(3):
            patch = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            torch.testing.assert_close(latents[:, :, row, column], (patch.reshape(2, 48) - 0.5) * 4)
    torch.testing.assert_close(codec.decode(latents), images)


def test_a_size_that_does_not_fit_is_refused_with_the_nearest() -> None:
    with pytest.raises(V2FlowError, match="30x32.*multiples of 4.*nearest is 32x32"):
        build_codec(CodecConfig(patch_size=4)).latent_shape(30, 32)


@pytest.fixture(scope="module")
def dc_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dc")
    AutoencoderDC(
        latent_channels=4,
        encoder_block_types=["ResBlock", "ResBlock"],
        decoder_block_types=["ResBlock", "ResBlock"],
        encoder_block_out_channels=[8, 16],
        decoder_block_out_channels=[8, 16],
        encoder_layers_per_block=[1, 1],
        decoder_layers_per_block=[1, 1],
        encoder_qkv_multiscales=[[], []],
        decoder_qkv_multiscales=[[], []],
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("kl")
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["dc", "kl"])
def test_a_frozen_autoencoder_is_loaded_scaled_and_stays_in_evaluation_mode(
    kind: str, request: pytest.FixtureRequest
) -> None:
    from diffusers import AutoencoderDC, AutoencoderKL

    folder = request.getfixturevalue(f"{kind}_folder")
    codec = build_codec(CodecConfig(kind=kind, path=str(folder), scale=0.5)).train()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    latents = codec.encode(images)
    assert latents.shape == (2, *codec.latent_shape(16, 16)) == (2, 4, 8, 8)
    plain = (AutoencoderDC if kind == "dc" else AutoencoderKL).from_pretrained(folder).eval()
    with torch.no_grad():
        encoded = plain.encode(images * 2 - 1)
        expected = encoded.latent if kind == "dc" else encoded.latent_dist.mean
        torch.testing.assert_close(latents, expected * 0.5)
        torch.testing.assert_close(codec.decode(latents), plain.decode(expected).sample / 2 + 0.5)
    assert not any(part.training for part in codec.autoencoder.modules())
    assert not any(parameter.requires_grad for parameter in codec.autoencoder.parameters())


def test_a_codec_without_a_path_or_with_a_wrong_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(V2FlowError, match="option codec.path: kind 'dc' needs"):
        build_codec(CodecConfig(kind="dc"))
    with pytest.raises(V2FlowError, match="option codec.path: .*not a loadable AutoencoderKL") as raised:
        build_codec(CodecConfig(kind="kl", path=str(tmp_path)))
    assert "\n" not in str(raised.value)


def test_the_published_dc_architecture_has_its_published_shape() -> None:
    with torch.device("meta"):
        codec = build_codec(CodecConfig(kind="dc", scale=0.41407), weights=False)
    assert codec.latent_shape(1024, 1024) == (32, 32, 32)
    assert codec.latent_shape(512, 512) == (32, 16, 16)


def test_pictures_that_do_not_fit_are_refused_before_any_work(dc_folder: Path) -> None:
    for config in (CodecConfig(patch_size=2), CodecConfig(kind="dc", path=str(dc_folder))):
        with pytest.raises(V2FlowError, match="15x16.*multiples of 2.*nearest is 16x16"):
            build_codec(config).encode(torch.zeros(1, 3, 15, 16))


def test_a_frozen_autoencoder_is_in_no_state_and_copies_share_it(kl_folder: Path) -> None:
    """Its weights would otherwise be in every checkpoint, twice with averaged weights."""
    module = torch.nn.ModuleDict(
        {"codec": build_codec(CodecConfig(kind="kl", path=str(kl_folder))), "layer": torch.nn.Linear(2, 2)}
    )
    assert set(module.state_dict()) == {"layer.weight", "layer.bias"}
    assert {name for name, _ in module.named_parameters()} == {"layer.weight", "layer.bias"}
    module.load_state_dict(module.state_dict(), strict=True)
    twin = copy.deepcopy(module)
    assert twin["codec"].autoencoder is module["codec"].autoencoder
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(twin["codec"].encode(images), module["codec"].encode(images))


def test_a_frozen_autoencoder_follows_the_module_around_it(kl_folder: Path) -> None:
    codec = build_codec(CodecConfig(kind="kl", path=str(kl_folder)))
    torch.nn.Sequential(codec).double()
    assert codec.encode(torch.zeros(1, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64


def test_the_fingerprint_names_the_weights(kl_folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    config = CodecConfig(kind="kl", path=str(kl_folder))
    name = build_codec(config).fingerprint()
    assert len(name) == 64 and build_codec(config).fingerprint() == name
    other = AutoencoderKL.from_pretrained(kl_folder)
    with torch.no_grad():
        other.decoder.conv_out.bias[0] += 1e-3
    other.save_pretrained(tmp_path)
    assert build_codec(CodecConfig(kind="kl", path=str(tmp_path))).fingerprint() != name
    assert build_codec(CodecConfig()).fingerprint() == ""


def test_a_new_kind_is_a_choice_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name in the configuration is one of `v2flow data latents --codec` as well."""
    words = ["data", "latents", "--data", "a.tar", "--out", "latents", "--codec", "wavelet"]
    with pytest.raises(V2FlowError, match="--codec: invalid choice: 'wavelet'"):
        build_parser().parse_args(words)
    monkeypatch.setitem(CodecConfig.__annotations__, "kind", Literal["patch", "wavelet"])
    assert build_parser().parse_args(words).codec == "wavelet"
