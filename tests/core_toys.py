"""A tokenizer small enough for tests: 16 px, 4×4 positions, 8 tokens, 32 codes, a vocabulary of 60 entries."""

import torch
from torch import Tensor

from v2flow.config import (
    CodecConfig,
    DecoderConfig,
    ResamplerConfig,
    TokenizerConfig,
    VelocityConfig,
    VisualVocabularyConfig,
    VocabularyConfig,
)


def small_config(**parts) -> TokenizerConfig:
    """The small configuration; `parts` are fields of TokenizerConfig given instead."""
    defaults = {
        "image_size": 16,
        "codec": CodecConfig(patch_size=4),
        "vocabulary": VocabularyConfig(source="random", size=60, dim=16),
        "resampler": ResamplerConfig(width=16, depth=1, token_grid=[4, 2], key_dim=8),
        "visual_vocabulary": VisualVocabularyConfig(size=32),
        "decoder": DecoderConfig(width=16, heads=2, encoder_depth=1, decoder_depth=1),
        "velocity": VelocityConfig(width=16, depth=1, heads=2, fine_width=8),
    }
    return TokenizerConfig(**(defaults | parts))


def pictures(count: int, seed: int = 0, size: int = 16) -> Tensor:
    """Smooth random pictures [count, 3, size, size] in [0, 1]."""
    coarse = torch.rand(count, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear")
