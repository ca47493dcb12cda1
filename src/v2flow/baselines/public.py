"""Public VQ checkpoints under the benchmark's protocol: `tokenizer: v2flow.baselines.public:diffusers_vq=HUB_ID`."""

from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor, nn

from v2flow.errors import V2FlowError, first_line
from v2flow.tokenizer import check_ids, check_images, inference


class DiffusersVQ(nn.Module):
    """A `diffusers.VQModel`, such as that of aMUSEd, as a tokenizer of square pictures.

    Args:
        model: the autoencoder.
        image_size: side of the pictures.

    Attributes:
        num_tokens: tokens a picture, N.
        codebook_size: K.
    """

    def __init__(self, model: Any, image_size: int) -> None:
        super().__init__()
        self.model = model
        self.image_size = image_size
        self.side = image_size // 2 ** (len(self.model.config.block_out_channels) - 1)
        self.num_tokens = self.side**2
        self.codebook_size: int = self.model.config.num_vq_embeddings

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Ids `[B, N]` long of pictures `[B, 3, S, S]` in [0, 1]."""
        check_images(images, self.image_size)
        with inference(self):
            latents = self.model.encode(2 * images - 1).latents
            ids: Tensor = self.model.quantize(latents)[2][2]
        return ids.reshape(len(images), self.num_tokens)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Pictures `[B, 3, S, S]` in [0, 1] of ids `[B, N]`."""
        check_ids(ids, self.num_tokens, self.codebook_size)
        with inference(self):
            shape = (len(ids), self.side, self.side, self.model.config.latent_channels)
            codes = ids.to(self.model.device).flatten()
            if not self.model.config.lookup_from_codebook:  # else `decode` takes ids
                codes = self.model.quantize.get_codebook_entry(codes, shape)
            pixels = self.model.decode(codes, force_not_quantize=True, shape=shape).sample
            return ((pixels + 1) / 2).float().clamp(0, 1)


def diffusers_vq(path: str, image_size: int = 256) -> DiffusersVQ:
    """A `diffusers.VQModel` from a folder or hub id; `PATH/SUBFOLDER` of a hub id with three parts.

    Raises:
        V2FlowError: it is not there or is not a VQModel.
    """
    parts = path.split("/")
    where, subfolder = (
        (path, None) if Path(path).is_dir() or len(parts) < 3 else ("/".join(parts[:2]), parts[2])
    )
    try:
        model: Any = VQModel.from_pretrained(where, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise V2FlowError(
            f"{path}: no diffusers VQModel could be loaded ({first_line(error)}); expected a folder or a hub "
            "id such as amused/amused-256/vqvae"
        ) from error
    return DiffusersVQ(model.eval(), image_size)
