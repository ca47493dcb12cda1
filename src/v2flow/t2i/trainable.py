"""What of the LLM learns: everything, its last blocks, low-rank adapters, or nothing; its text rows never do."""

import warnings
from typing import Any

import torch
from torch import nn

from v2flow.errors import V2FlowError, missing
from v2flow.t2i.config import TextToImageConfig


def set_trainable(llm: Any, config: TextToImageConfig) -> Any:
    """The LLM, wrapped if it gets adapters, whose parameters require gradients as `config.train` says.

    Call it after the visual rows were made of it.

    Raises:
        V2FlowError: more blocks to train than there are, or LoRA without peft.
    """
    llm.requires_grad_(False)
    if config.train == "full":
        llm.requires_grad_(True)
    elif config.train == "last_layers":
        blocks = find_blocks(llm)
        if config.train_layers > len(blocks):
            raise V2FlowError(
                f"option text_to_image.train_layers: expected at most {len(blocks)}, the LLM's blocks, found "
                f"{config.train_layers}; use train=full for all"
            )
        for part in (*blocks[-config.train_layers :], find_norm(llm)):
            part.requires_grad_(True)
    elif config.train == "lora":
        llm = _with_adapters(llm, config)
    for part in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        part.requires_grad_(False)
    return llm


def find_blocks(llm: Any) -> nn.ModuleList:
    """The transformer blocks of a causal LLM, first to last.

    Raises:
        V2FlowError: its body has no list of them.
    """
    count = llm.config.num_hidden_layers
    lists = [c for c in llm.get_decoder().children() if isinstance(c, nn.ModuleList) and len(c) == count]
    if len(lists) != 1:
        raise V2FlowError(
            f"LLM of type {llm.config.model_type}: expected one list of {count} blocks in its body, found "
            f"{len(lists)}; use train=full, lora or rows"
        )
    return lists[0]


def find_norm(llm: Any) -> nn.Module:
    """The norm behind the last block, in whatever name the LLM has for it.

    Raises:
        V2FlowError: its body has none.
    """
    found = [c for name, c in llm.get_decoder().named_children() if "norm" in name or name.startswith("ln")]
    if len(found) != 1:
        raise V2FlowError(
            f"LLM of type {llm.config.model_type}: expected one final norm in its body, found {len(found)}; "
            "use train=full, lora or rows"
        )
    return found[0]


def _with_adapters(llm: Any, config: TextToImageConfig) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise V2FlowError(f"option text_to_image.train: lora {missing('peft', 't2i')}") from error
    options = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # peft divides it by the rank: any number will do
        lora_dropout=config.lora.dropout,
        target_modules="all-linear",  # all but the head
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # GPT-2's projections are transposed, which peft sees and says.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        torch.manual_seed(config.seed)
        return get_peft_model(llm, options)
