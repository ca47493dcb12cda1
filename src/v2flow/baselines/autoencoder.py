"""What the baselines share: a quantizer between an encoder and a decoder of latents."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from v2flow.baselines.quantizers import Quantizer, QuantizerConfig
from v2flow.codec import ImageCodec, build_codec
from v2flow.config import CodecConfig
from v2flow.errors import V2FlowError
from v2flow.tokenizer import check_ids, check_images, inference


@dataclass
class AutoencoderConfig(QuantizerConfig):
    """Options that every baseline has."""

    image_size: int = 32
    """Side of the square pictures."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    width: int = 192
    """Width of the transformers."""
    heads: int = 6
    """Attention heads of the transformers."""

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("heads", self.width % self.heads == 0, f"a divisor of width {self.width}"),
            ("width", self.width % 4 == 0, "a multiple of 4, for two-dimensional positions"),
            ("codebook_size", self.codebook_size >= 2, "at least 2 codes"),
            ("decay", 0 <= self.decay < 1, "a number in [0, 1)"),
        ):
            if not holds:
                raise V2FlowError(f"option {name}: expected {expected}, found {getattr(self, name)!r}")
        super().__post_init__()


class Autoencoder(nn.Module):
    """Pictures to ids and back, trained by the squared error of the latents.

    A baseline makes `quantizer` and `output`, its last layer, and says in `features` and `latents` what lies before and
    behind the quantizer.

    Args:
        config: sizes and options.
        num_tokens: tokens a picture, N.

    Attributes:
        num_tokens: N.
        codebook_size: K.
        latent_grid: rows and columns of latent positions.
    """

    quantizer: Quantizer
    output: nn.Linear

    def __init__(self, config: AutoencoderConfig, num_tokens: int) -> None:
        super().__init__()
        self.config: Any = config
        self.codec: ImageCodec = build_codec(config.codec)
        channels, height, width = self.codec.latent_shape(config.image_size, config.image_size)
        self.channels, self.latent_grid = channels, (height, width)
        self.num_tokens, self.codebook_size = num_tokens, config.codebook_size

    def features(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` to what is quantised, `[B, N, code_dim]`."""
        raise NotImplementedError

    def latents(self, codes: Tensor) -> Tensor:
        """Codes `[B, N, code_dim]` to latents `[B, C, h, w]`."""
        raise NotImplementedError

    def follow_process_group(self) -> None:
        """Let the codebook's statistics be those of all ranks, if there are several.

        The library decides this when a codebook is made, and a model is made before its ranks are: call this once
        they are.
        """
        quantizer = Quantizer(self.config)
        quantizer.load_state_dict(self.quantizer.state_dict())
        self.quantizer = quantizer.to(self.output.weight.device).train(self.quantizer.training)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Total loss of pictures `[B, 3, H, W]` in [0, 1], its terms as in `losses`, and the latents `[B, C, h, w]` of
        their reconstructions, with gradient."""
        with torch.no_grad():
            latents = self.codec.encode(check_images(images, self.config.image_size))
        return self.reconstruct_latents(latents)

    def reconstruct_latents(self, latents: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """What calling the model gives, of pictures whose codec latents `[B, C, h, w]` are at hand."""
        codes, _, auxiliary = self.quantizer(self.features(latents))
        reconstructed = self.latents(codes)
        error = (reconstructed - latents).square().mean()
        return error + auxiliary, {"mean": error, "quantizer": auxiliary}, reconstructed

    def losses(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss of pictures `[B, 3, H, W]` in [0, 1], and its terms: squared error (latent units),
        and the quantizer's own (commitment, entropy)."""
        total, terms, _ = self(images)
        return total, terms

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Ids `[B, N]` long of pictures `[B, 3, H, W]` in [0, 1].

        Raises:
            V2FlowError: an empty batch, or pictures of another shape than the autoencoder was made for.
        """
        if not len(check_images(images, self.config.image_size)):
            raise V2FlowError("images: expected at least one picture, found an empty batch")
        with inference(self), torch.autocast(images.device.type, enabled=False):
            ids: Tensor = self.quantizer(self.features(self.codec.encode(images.float())))[1]
        return ids

    @torch.no_grad()
    def decode(self, ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pictures `[B, 3, H, W]` in [0, 1] of ids `[B, N]`; nothing is drawn, the generator is not used.

        Raises:
            V2FlowError: ids of another shape or outside [0, K).
        """
        check_ids(ids, self.num_tokens, self.codebook_size)
        with inference(self):
            codes = self.quantizer.lookup(ids.to(self.output.weight.device))
            return self.codec.decode(self.latents(codes)).float().clamp(0, 1)
