"""A plain VQ autoencoder: V2Flow's encoder, a library's cosine codebook, a feed-forward transformer decoder."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from v2flow.codec import build_codec
from v2flow.config import CodecConfig, ResamplerConfig
from v2flow.errors import V2FlowError
from v2flow.masked_decoder import token_above
from v2flow.resampler import PatchEncoder
from v2flow.tokenizer import check_ids, inference
from v2flow.transformer import Transformer, grid_positions


@dataclass
class VQAutoencoderConfig:
    """Everything that defines the baseline; the encoder's options are the resampler's."""

    image_size: int = 32
    """Side of the square pictures."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    encoder: ResamplerConfig = field(default_factory=ResamplerConfig)
    """Only width, depth and token_grid act here."""
    codebook_size: int = 1024
    """Number of codes K."""
    code_dim: int = 32
    """Width of a code."""
    decay: float = 0.95
    """Decay of the codebook's running means."""
    commitment: float = 0.25
    """Weight of the commitment loss."""
    dead_code_threshold: float = 1.0
    """Codes whose running count falls below this are replaced by tokens of the batch."""
    width: int = 192
    """Width of the decoder."""
    heads: int = 6
    """Attention heads of the decoder."""
    depth: int = 4
    """Blocks of the decoder: as many as V2Flow's masked decoder has in its two halves."""


class VQAutoencoder(nn.Module):
    """Pictures to ids and back, trained by the squared error of the latents.

    Args:
        config: sizes and options.

    Attributes:
        num_tokens: tokens a picture, N.
        codebook_size: K.
    """

    def __init__(self, config: VQAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.codec = build_codec(config.codec)
        channels, height, width = self.codec.latent_shape(config.image_size, config.image_size)
        rows, columns = config.encoder.token_grid
        if rows > height or columns > width:
            raise V2FlowError(
                f"option encoder.token_grid: {rows}x{columns} tokens need at least as many latent positions, "
                f"found {height}x{width}"
            )
        self.latent_grid, self.num_tokens, self.codebook_size = (height, width), rows * columns, config.codebook_size
        self.encoder = PatchEncoder(channels, config.encoder)
        self.to_code = nn.Linear(config.encoder.width, config.code_dim)
        self.quantizer = VectorQuantize(
            dim=config.code_dim,
            codebook_size=config.codebook_size,
            use_cosine_sim=True,
            ema_update=True,
            decay=config.decay,
            commitment_weight=config.commitment,
            threshold_ema_dead_code=config.dead_code_threshold,
            kmeans_init=False,
            rotation_trick=False,  # the plain straight-through gradient, as V2Flow's own codebook has
            learnable_codebook=False,
        )
        self.from_code = nn.Linear(config.code_dim, config.width)
        self.positions = nn.Parameter(grid_positions(height, width, config.width))
        self.decoder = Transformer(config.width, config.depth, config.heads)
        self.output = nn.Linear(config.width, channels)
        self.register_buffer("above", token_above((rows, columns), (height, width)), persistent=False)

    def losses(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss of pictures `[B, 3, H, W]` in [0, 1], and its terms: squared error (latent units), commitment."""
        with torch.no_grad():
            latents = self.codec.encode(self._checked(images))
        codes, _, commitment = self.quantizer(self.to_code(self.encoder(latents)))
        error = (self._latents(codes) - latents).square().mean()
        total = error + commitment.sum()
        return total, {"mean": error, "commitment": commitment.sum()}

    def _latents(self, codes: Tensor) -> Tensor:
        x = self.from_code(codes)[:, self.above] + self.positions
        return self.output(self.decoder(x)).transpose(1, 2).unflatten(2, self.latent_grid)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Ids `[B, N]` long of pictures `[B, 3, H, W]` in [0, 1]."""
        with inference(self):
            latents = self.codec.encode(self._checked(images).float())
            ids: Tensor = self.quantizer(self.to_code(self.encoder(latents)))[1]
        return ids

    @torch.no_grad()
    def decode(self, ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pictures `[B, 3, H, W]` in [0, 1] of ids `[B, N]`; nothing is drawn, the generator is not used."""
        check_ids(ids, self.num_tokens, self.codebook_size)
        with inference(self):
            codes = self.quantizer.get_output_from_indices(ids)
            return self.codec.decode(self._latents(codes)).float().clamp(0, 1)

    def _checked(self, images: Tensor) -> Tensor:
        size = self.config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise V2FlowError(f"images: expected shape [B, 3, {size}, {size}], found {list(images.shape)}")
        return images
