"""A public VQ checkpoint as a tokenizer: its reconstructions are those of the model itself."""

from pathlib import Path

import pytest
import torch
from diffusers import VQModel

from v2flow.baselines.public import diffusers_vq
from v2flow.errors import V2FlowError


@pytest.fixture(params=[False, True], ids=["codes", "ids"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Of a model whose `decode` takes codes, or ids, as aMUSEd's does."""
    model = VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, num_vq_embeddings=16,
        lookup_from_codebook=request.param,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "vqvae")
    return tmp_path / "vqvae"


def test_reconstructions_are_the_models_own(folder: Path) -> None:
    tokenizer = diffusers_vq(str(folder), image_size=16)
    assert (tokenizer.num_tokens, tokenizer.codebook_size) == (64, 16)
    images = torch.rand(3, 3, 16, 16)
    ids = tokenizer.encode(images)
    assert ids.shape == (3, 64) and ids.dtype == torch.long
    with torch.no_grad():
        own = (VQModel.from_pretrained(folder).eval()(2 * images - 1).sample + 1) / 2
    assert torch.allclose(tokenizer.decode(ids), own.clamp(0, 1), atol=1e-5)


def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(V2FlowError, match=r"no diffusers VQModel could be loaded"):
        diffusers_vq(str(tmp_path))
