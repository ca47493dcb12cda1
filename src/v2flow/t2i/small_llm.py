"""Small LLMs for runs without a pretrained one: GPT-2, or GPT-NeoX, with a vocabulary trained on the captions alone."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPTNeoXConfig, PreTrainedConfig, PreTrainedTokenizerFast

from v2flow.errors import V2FlowError, first_line

PREFIXES = ("gpt2-style:", "neox-style:")
"""GPT-NeoX is GPT-2 with rotary positions: a patch finds the one above it however long the caption is, where GPT-2 has
to learn that for each length."""
SMALL = " or ".join(f"{prefix}SIZE" for prefix in PREFIXES)
SIZES = {"tiny": (2, 64, 2), "small": (4, 256, 4), "medium": (6, 384, 6), "base": (8, 512, 8)}
"""Blocks, width and heads by name: 0.1, 3, 11 and 25 million parameters without the embeddings."""
POSITIONS = 1280  # a caption and the paper's largest picture, 1,024 tokens
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"


def small_llm(source: str, tokenizer: Any) -> PreTrainedConfig:
    """The configuration of a small LLM, such as `neox-style:small`, for the tokenizer's vocabulary.

    Raises:
        V2FlowError: an unknown size.
    """
    style, _, size = source.partition(":")
    if size not in SIZES:
        raise V2FlowError(
            f"option llm: expected {style}: followed by one of {', '.join(SIZES)}, found {size!r}"
        )
    layers, width, heads = SIZES[size]
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    # Without dropout, as the pretrained LLMs that it is compared with. GPT-2's activation, but as one operator: written
    # out, as transformers does it under the name `gelu_new`, it takes a quarter of a training step.
    if style == "gpt2-style":
        return GPT2Config(
            n_positions=POSITIONS, n_embd=width, n_layer=layers, n_head=heads, activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common,
        )  # fmt: skip
    # As in GPT-2 one branch follows the other and the head is the embedding; wavelengths up to the longest sequence.
    return GPTNeoXConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
        hidden_act="gelu_pytorch_tanh", max_position_embeddings=POSITIONS, use_parallel_residual=False,
        tie_word_embeddings=True, classifier_dropout=0.0,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 1.0}, **common,
    )  # fmt: skip


def train_caption_llm_tokenizer(captions: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` entries, trained on the captions; it can spell any text.

    The same captions give the same tokenizer.

    Raises:
        V2FlowError: fewer entries than the 256 bytes and 3 special tokens need.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + 3
    if vocab_size < least:
        raise V2FlowError(f"vocab_size: expected at least {least} entries, found {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS, PAD], initial_alphabet=sorted(alphabet),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return caption_llm_tokenizer(tokenizer.to_str())


def backend_text(tokenizer: PreTrainedTokenizerFast) -> str:
    """What makes such a tokenizer anew, without the visual tokens that may have been added to it."""
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] in (BOS, EOS, PAD)]
    return json.dumps(document)


def caption_llm_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """The tokenizer that `backend_text` says.

    Raises:
        V2FlowError: the text says none.
    """
    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:  # the library raises no other
        raise V2FlowError(f"llm_tokenizer: not a tokenizer ({first_line(error)})") from error
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        model_max_length=POSITIONS,
    )  # fmt: skip
