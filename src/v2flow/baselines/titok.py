"""A one-dimensional tokenizer after TiTok (Yu et al. 2024, arXiv 2406.07550, section 3.2): tokens without a grid.

The published one learns the codes of another tokenizer first and pixels after; this one learns the latents of its codec
in a single stage, as the other baselines do.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from v2flow.baselines.autoencoder import Autoencoder, AutoencoderConfig
from v2flow.baselines.quantizers import Quantizer
from v2flow.config import require_blocks
from v2flow.errors import V2FlowError
from v2flow.transformer import Transformer, grid_positions, init_linear


@dataclass
class TiTokConfig(AutoencoderConfig):
    """Everything that defines the baseline."""

    num_tokens: int = 64
    """Tokens a picture, N: any number, whatever the grid of latents."""
    encoder_depth: int = 4
    """Blocks over the latents and the queries."""
    decoder_depth: int = 4
    """Blocks over the quantised tokens and the mask tokens."""

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise V2FlowError(f"option num_tokens: expected at least 1, found {self.num_tokens}")
        for name in ("encoder_depth", "decoder_depth"):
            require_blocks(name, getattr(self, name), least=1)
        super().__post_init__()


class TiTokAutoencoder(Autoencoder):
    """Learned queries gather the picture, and mask tokens read it back from what was quantised of them.

    Args:
        config: sizes and options.
    """

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__(config, config.num_tokens)
        width = config.width
        positions = grid_positions(*self.latent_grid, width)
        self.embed = nn.Linear(self.channels, width)
        self.encoder_positions = nn.Parameter(positions)
        self.queries = nn.Parameter(torch.randn(config.num_tokens, width) * width**-0.5)
        self.encoder = Transformer(width, config.encoder_depth, config.heads)
        self.to_code = nn.Linear(width, config.code_dim)
        self.quantizer = Quantizer(config)
        self.from_code = nn.Linear(config.code_dim, width)
        self.token_positions = nn.Parameter(torch.randn(config.num_tokens, width) * width**-0.5)
        self.mask_token = nn.Parameter(torch.randn(width) * width**-0.5)
        self.decoder_positions = nn.Parameter(positions.clone())
        self.decoder = Transformer(width, config.decoder_depth, config.heads)
        self.output = nn.Linear(width, self.channels)
        # The quantizer has maps of its own, which it initialises itself.
        for part in (self.embed, self.encoder, self.to_code, self.from_code, self.decoder, self.output):
            init_linear(part)

    def features(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to unquantised tokens [B, N, D]: what N queries have gathered from all positions."""
        x = self.embed(latents.flatten(2).transpose(1, 2)) + self.encoder_positions
        x = self.encoder(torch.cat([x, self.queries.expand(len(x), -1, -1)], dim=1))
        return self.to_code(x[:, -self.num_tokens :])

    def latents(self, codes: Tensor) -> Tensor:
        """Quantised tokens [B, N, D] to latents [B, C, h, w], from mask tokens at all positions."""
        tokens = self.from_code(codes) + self.token_positions
        masks = (self.mask_token + self.decoder_positions).expand(len(codes), -1, -1)
        x = self.decoder(torch.cat([tokens, masks], dim=1))[:, self.num_tokens :]
        return self.output(x).transpose(1, 2).unflatten(2, self.latent_grid)
