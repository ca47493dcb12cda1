"""Sizes of language models and vocabularies without their weights: from a config.json, or known by name."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig

from v2flow.config import VocabularyConfig
from v2flow.errors import V2FlowError
from v2flow.t2i.language_model import first_layers
from v2flow.t2i.small_llm import PREFIXES, SMALL, small_llm

CAPTION_VOCABULARY = 4096
"""Entries of the tokenizer that a small LLM trains on its captions; it may find fewer."""
WORDLLAMA = (32000, 256)
"""Rows and width of the table in the package wordllama."""


def language_model_config(source: str, layers: int | None = None) -> Any:
    """The transformers configuration of a language model, of which nothing but a config.json need be there.

    Args:
        source: as for `load_language_model`; folders that are not there are known if their name has llama-2-7b in it.
        layers: keep this many blocks.

    Raises:
        V2FlowError: no config.json and no name that is known, or `layers` out of range.
    """
    if source.startswith(PREFIXES):
        words = _Words(bos_token_id=0, eos_token_id=1, pad_token_id=2)
        return first_layers(small_llm(source, words), layers)
    if source == "gemma3-270m":
        return first_layers(_gemma3_270m(), layers)
    if (Path(source) / "config.json").is_file():
        return first_layers(AutoConfig.from_pretrained(source, local_files_only=True), layers)
    if "llama-2-7b" in source.lower():
        return first_layers(_llama2_7b(), layers)
    raise V2FlowError(
        f"LLM {source!r}: expected gemma3-270m, {SMALL}, a name with llama-2-7b in it or a folder with a "
        "config.json, found none of them; its weights are not needed, but its config.json is"
    )


def vocabulary_shape(config: VocabularyConfig) -> tuple[int, int]:
    """Rows and width of the table that a tokenizer is trained over.

    Raises:
        V2FlowError: see `language_model_config`.
    """
    if config.source == "random":
        return config.size or 2048, config.dim
    if config.source == "wordllama":
        rows, width = WORDLLAMA
    elif Path(config.source).is_file():
        from v2flow.llm import load_vocabulary

        rows, width = load_vocabulary(config).table.shape
    else:
        llm = language_model_config(config.source).get_text_config()
        rows, width = llm.vocab_size, llm.hidden_size
    return config.size or rows, width


class _Words(SimpleNamespace):
    """As much of a tokenizer as a GPT-2's configuration asks for."""

    def __len__(self) -> int:
        return CAPTION_VOCABULARY


def _gemma3_270m() -> Gemma3TextConfig:
    return Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256, sliding_window=512,
        max_position_embeddings=32768, tie_word_embeddings=True,
    )  # fmt: skip


def _llama2_7b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
