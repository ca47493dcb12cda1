"""VQ autoencoders: V2Flow's encoder, a quantizer of vector-quantize-pytorch, a feed-forward transformer decoder."""

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from v2flow.baselines.quantizers import Quantizer, QuantizerConfig
from v2flow.codec import build_codec
from v2flow.config import CodecConfig, ResamplerConfig
from v2flow.errors import V2FlowError
from v2flow.masked_decoder import token_above
from v2flow.resampler import PatchEncoder
from v2flow.tokenizer import check_ids, check_images, check_token_grid, inference
from v2flow.transformer import Transformer, grid_positions


@dataclass
class VQAutoencoderConfig(QuantizerConfig):
    """Everything that defines the baseline; the encoder's options are the resampler's."""

    image_size: int = 32
    """Side of the square pictures."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    encoder: ResamplerConfig = field(default_factory=ResamplerConfig)
    """Width, depth and token_grid; the options of the vocabulary's read-out have no place here."""
    width: int = 192
    """Width of the decoder."""
    heads: int = 6
    """Attention heads of the decoder."""
    depth: int = 4
    """Blocks of the decoder: as many as V2Flow's masked decoder has in its two halves."""

    def __post_init__(self) -> None:
        acting = ResamplerConfig(self.encoder.width, self.encoder.depth, self.encoder.token_grid)
        for name, value in asdict(acting).items():
            if getattr(self.encoder, name) != value:
                raise V2FlowError(f"option encoder.{name}: has no effect on the VQ autoencoder; leave it out")
        for name, holds, expected in (
            ("heads", self.width % self.heads == 0, f"a divisor of width {self.width}"),
            ("width", self.width % 4 == 0, "a multiple of 4, for two-dimensional positions"),
            ("codebook_size", self.codebook_size >= 2, "at least 2 codes"),
            ("decay", 0 <= self.decay < 1, "a number in [0, 1)"),
        ):
            if not holds:
                raise V2FlowError(f"option {name}: expected {expected}, found {getattr(self, name)!r}")
        super().__post_init__()


class VQAutoencoder(nn.Module):
    """Pictures to ids and back, trained by the squared error of the latents.

    Args:
        config: sizes and options.

    Attributes:
        num_tokens: tokens a picture, N.
        codebook_size: K.
    """

    above: Tensor

    def __init__(self, config: VQAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.codec = build_codec(config.codec)
        channels, height, width = self.codec.latent_shape(config.image_size, config.image_size)
        rows, columns = config.encoder.token_grid
        check_token_grid("encoder.token_grid", (rows, columns), (height, width))
        self.latent_grid, self.num_tokens, self.codebook_size = (
            (height, width),
            rows * columns,
            config.codebook_size,
        )
        self.encoder = PatchEncoder(channels, config.encoder)
        self.to_code = nn.Linear(config.encoder.width, config.code_dim)
        self.quantizer = Quantizer(config)
        self.from_code = nn.Linear(config.code_dim, config.width)
        self.positions = nn.Parameter(grid_positions(height, width, config.width))
        self.decoder = Transformer(config.width, config.depth, config.heads)
        self.output = nn.Linear(config.width, channels)
        self.register_buffer("above", token_above((rows, columns), (height, width)), persistent=False)

    def follow_process_group(self) -> None:
        """Let the codebook's statistics be those of all ranks, if there are several.

        The library decides this when a codebook is made, and a model is made before its ranks are: call this once
        they are.
        """
        quantizer = Quantizer(self.config)
        quantizer.load_state_dict(self.quantizer.state_dict())
        self.quantizer = quantizer.to(self.positions.device).train(self.quantizer.training)

    def losses(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss of pictures `[B, 3, H, W]` in [0, 1], and its terms: squared error (latent units),
        and the quantizer's own (commitment, entropy)."""
        with torch.no_grad():
            latents = self.codec.encode(check_images(images, self.config.image_size))
        codes, _, auxiliary = self.quantizer(self.to_code(self.encoder(latents)))
        error = (self._latents(codes) - latents).square().mean()
        total = error + auxiliary
        return total, {"mean": error, "quantizer": auxiliary}

    def _latents(self, codes: Tensor) -> Tensor:
        x = self.from_code(codes)[:, self.above] + self.positions
        return self.output(self.decoder(x)).transpose(1, 2).unflatten(2, self.latent_grid)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Ids `[B, N]` long of pictures `[B, 3, H, W]` in [0, 1].

        Raises:
            V2FlowError: an empty batch, or pictures of another shape than the autoencoder was made for.
        """
        if not len(check_images(images, self.config.image_size)):
            raise V2FlowError("images: expected at least one picture, found an empty batch")
        with inference(self), torch.autocast(images.device.type, enabled=False):
            latents = self.codec.encode(images.float())
            ids: Tensor = self.quantizer(self.to_code(self.encoder(latents)))[1]
        return ids

    @torch.no_grad()
    def decode(self, ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pictures `[B, 3, H, W]` in [0, 1] of ids `[B, N]`; nothing is drawn, the generator is not used.

        Raises:
            V2FlowError: ids of another shape or outside [0, K).
        """
        check_ids(ids, self.num_tokens, self.codebook_size)
        with inference(self):
            codes = self.quantizer.lookup(ids.to(self.positions.device))
            return self.codec.decode(self._latents(codes)).float().clamp(0, 1)
