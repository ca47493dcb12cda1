"""VQ autoencoders: V2Flow's encoder, a quantizer of vector-quantize-pytorch, a feed-forward transformer decoder."""

from dataclasses import asdict, dataclass, field

from torch import Tensor, nn

from v2flow.baselines.autoencoder import Autoencoder, AutoencoderConfig
from v2flow.baselines.quantizers import Quantizer
from v2flow.config import ResamplerConfig, require_blocks
from v2flow.errors import V2FlowError
from v2flow.masked_decoder import token_above
from v2flow.resampler import PatchEncoder
from v2flow.tokenizer import check_token_grid
from v2flow.transformer import Transformer, grid_positions


@dataclass
class VQAutoencoderConfig(AutoencoderConfig):
    """Everything that defines the baseline; width and heads are the decoder's."""

    encoder: ResamplerConfig = field(default_factory=ResamplerConfig)
    """The resampler's width, depth and token_grid; the options of the vocabulary's read-out have no place here."""
    depth: int = 4
    """Blocks of the decoder: as many as V2Flow's masked decoder has in its two halves."""

    def __post_init__(self) -> None:
        require_blocks("depth", self.depth)
        acting = ResamplerConfig(self.encoder.width, self.encoder.depth, self.encoder.token_grid)
        for name, value in asdict(acting).items():
            if getattr(self.encoder, name) != value:
                raise V2FlowError(f"option encoder.{name}: has no effect on the VQ autoencoder; leave it out")
        super().__post_init__()


class VQAutoencoder(Autoencoder):
    """Tokens on a grid over the picture, each seen by the latents under it.

    Args:
        config: sizes and options.
    """

    above: Tensor

    def __init__(self, config: VQAutoencoderConfig) -> None:
        rows, columns = config.encoder.token_grid
        super().__init__(config, rows * columns)
        check_token_grid("encoder.token_grid", (rows, columns), self.latent_grid)
        self.encoder = PatchEncoder(self.channels, config.encoder)
        self.to_code = nn.Linear(config.encoder.width, config.code_dim)
        self.quantizer = Quantizer(config)
        self.from_code = nn.Linear(config.code_dim, config.width)
        self.positions = nn.Parameter(grid_positions(*self.latent_grid, config.width))
        self.decoder = Transformer(config.width, config.depth, config.heads)
        self.output = nn.Linear(config.width, self.channels)
        self.register_buffer("above", token_above((rows, columns), self.latent_grid), persistent=False)

    def features(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to unquantised tokens [B, N, D] on the token grid."""
        return self.to_code(self.encoder(latents))

    def latents(self, codes: Tensor) -> Tensor:
        """Quantised tokens [B, N, D] to latents [B, C, h, w]; each position starts from the token above it."""
        x = self.from_code(codes)[:, self.above] + self.positions
        return self.output(self.decoder(x)).transpose(1, 2).unflatten(2, self.latent_grid)
