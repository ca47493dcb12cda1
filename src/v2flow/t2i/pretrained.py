"""Reading the weights of a causal LLM through transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging


def read_causal_llm(source: str | Path, dtype: torch.dtype | str, local: bool, config: Any = None) -> Any:
    """The model of a Hugging Face folder or hub id.

    Args:
        dtype: of its weights; "auto" for the one that they are saved in.
        local: download nothing.
        config: instead of its own, to leave blocks out.

    Raises:
        ValueError: weights are missing, which transformers would draw at random.
        Exception: of whatever class transformers and its readers have for a damaged folder.
    """
    with _no_table_of_keys():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, trust_remote_code=False, local_files_only=local,
            output_loading_info=True,
        )  # fmt: skip
    model, keys = loaded
    if missing := sorted(keys["missing_keys"]):
        raise ValueError(f"no weights of {', '.join(missing[:3])}")
    return model


@contextmanager
def _no_table_of_keys() -> Iterator[None]:
    """Without transformers' table of weights that were not as expected.

    Blocks left out on purpose fill it, and missing weights are an error here.
    """
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
