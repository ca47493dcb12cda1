"""Toy models for the demo: a tokenizer whose options change its pictures, a VQ baseline, a text-to-image model."""

from pathlib import Path

import torch
from core_toys import small_config
from PIL import Image

from v2flow import V2FlowTokenizer
from v2flow.baselines.vq_autoencoder import VQAutoencoder, VQAutoencoderConfig
from v2flow.config import ResamplerConfig, TokenizerConfig
from v2flow.inference import LoadedModel


def demo_tokenizer(config: TokenizerConfig | None = None) -> V2FlowTokenizer:
    torch.manual_seed(0)
    model = V2FlowTokenizer(config or small_config()).eval()
    for parameter in model.head.parameters():  # an untrained field is zero: no option would change a picture
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def demo_baseline(size: int = 16) -> LoadedModel:
    """As loaded from a checkpoint; `v2flow export` has no folder for it that could be written here."""
    torch.manual_seed(0)
    config = VQAutoencoderConfig(
        image_size=size, encoder=ResamplerConfig(width=16, depth=1, token_grid=[4, 2]), width=16, heads=2,
        depth=1, codebook_size=32, code_dim=8,
    )  # fmt: skip
    loaded = LoadedModel.__new__(LoadedModel)
    loaded.device, loaded.model = torch.device("cpu"), VQAutoencoder(config).eval()
    loaded.name, loaded.modes = "VQAutoencoder", {"decode": {}}
    return loaded


def write_text_to_image(folder: Path) -> str:
    """An exported text-to-image model with random rows; needs the extra `t2i`."""
    from t2i_toys import tiny_llm, tiny_tokenizer

    from v2flow import V2FlowForTextToImage
    from v2flow.t2i.extension import extend_vocabulary

    tokenizer, words = demo_tokenizer(), tiny_tokenizer()
    llm = tiny_llm("llama", len(words))
    tokens = extend_vocabulary(llm, words, tokenizer.codebook_size)
    model = V2FlowForTextToImage(tokenizer, llm, words, tokens)
    with torch.no_grad():
        for parameter in model.rows.parameters():
            parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return str(folder)


def write_picture(path: Path) -> str:
    """A JPEG of 40 by 24 px: red to the left, blue to the right."""
    picture = Image.new("RGB", (40, 24), (200, 40, 30))
    picture.paste((30, 60, 200), (20, 0, 40, 24))
    picture.save(path)
    return str(path)
