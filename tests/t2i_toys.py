"""Tiny randomly initialised LLMs of every supported family, and a tokenizer trained on a few captions."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
)

from v2flow.t2i.small_llm import train_caption_llm_tokenizer

CAPTIONS = ["a red strawberry", "two green apples", "a dog beside a red house", "the moon above the sea"]
FAMILIES = ["gemma2", "gemma3", "llama", "llama-tied", "qwen2", "phi", "gpt2", "gpt-neox"]
WIDTH, HEADS, LAYERS = 32, 2, 2


def tiny_tokenizer(vocab_size: int = 290) -> Any:
    return train_caption_llm_tokenizer(CAPTIONS, vocab_size)


def tiny_config(family: str, vocab_size: int, layers: int = LAYERS) -> PretrainedConfig:
    """A configuration of the family: width 32."""
    common: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": 1, "max_position_embeddings": 128,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    if family == "gemma2":  # both caps low enough to act on a tiny model's logits
        return Gemma2Config(**common, head_dim=16, final_logit_softcapping=0.5, attn_logit_softcapping=5.0)
    if family == "gemma3":
        return Gemma3TextConfig(**common, head_dim=16, sliding_window=8)
    if family == "llama":
        return LlamaConfig(**common, tie_word_embeddings=False)
    if family == "llama-tied":
        return LlamaConfig(**common, tie_word_embeddings=True)
    if family == "qwen2":
        return Qwen2Config(**common, tie_word_embeddings=False)
    if family == "phi":
        return PhiConfig(**common | {"num_key_value_heads": HEADS})
    if family == "gpt-neox":
        del common["num_key_value_heads"]
        return GPTNeoXConfig(**common, tie_word_embeddings=True, use_parallel_residual=False)
    return GPT2Config(
        vocab_size=vocab_size, n_embd=WIDTH, n_layer=layers, n_head=HEADS, n_positions=128,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def tiny_llm(family: str, vocab_size: int, seed: int = 0, layers: int = LAYERS) -> Any:
    """A model of the family in evaluation mode; its rows share a mean, as those of real LLMs do, and biases are not
    zero."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(tiny_config(family, vocab_size, layers)).eval()
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight.copy_(0.3 * torch.randn(weight.shape) + 0.1 * torch.randn(WIDTH))
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    return model
