"""What readers of an exported LLM look for in places that transformers 5 no longer writes.

transformers 5 keeps the base frequencies of rotary positions below ``rope_parameters``, leaves the added tokens and the
space before the first word to ``tokenizer.json``, and calls its general tokenizer TokenizersBackend. What is built on
transformers 4 knows nothing of that: it refuses the tokenizer or splits words otherwise, and computes with frequencies
that are not the model's. It is told here, in the old places, where transformers 5 finds the same values again.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

OLD_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""What transformers 4 calls TokenizersBackend; transformers 5 knows both names."""
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
_OF_THIS_RUN = ("is_local", "local_files_only")  # how the tokenizer was loaded here


def write_old_places(folder: Path, tokenizer: Any) -> None:
    """Adds them to ``config.json`` and ``tokenizer_config.json`` of an LLM in `folder`.

    Args:
        tokenizer: the LLM's, as it was saved there.
    """
    _edit(folder / "config.json", lambda config: config | old_config(config))
    _edit(folder / "tokenizer_config.json", lambda config: old_tokenizer(config, tokenizer))


def old_config(config: dict[str, Any]) -> dict[str, Any]:
    """Keys of transformers 4 that say what a model's configuration says elsewhere.

    Gemma 3 has rotary parameters for each kind of layer: there ``rope_theta`` is that of full attention.
    """
    parameters = config.get("rope_parameters") or {}
    main = parameters.get("full_attention", parameters)
    found = {key: main[key] for key in ("rope_theta", "partial_rotary_factor") if key in main}
    if "sliding_attention" in parameters:
        found["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    if main.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: value for key, value in main.items() if key not in found}
    if "n_positions" in config:  # of GPT-2, for llama.cpp's converter
        found["n_ctx"] = config["n_positions"]
    return found


def old_tokenizer(config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A tokenizer's settings with those that transformers 4 reads from them, and without those of the run that saved
    them.

    Transformers 4 takes a missing ``add_prefix_space`` for false, whatever ``tokenizer.json`` says.
    """
    kept = {key: value for key, value in config.items() if key not in _OF_THIS_RUN}
    if kept["tokenizer_class"] == "TokenizersBackend":
        kept["tokenizer_class"] = OLD_TOKENIZER_CLASS
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    state = {} if splitter is None else json.loads(splitter.__getstate__())
    if "add_prefix_space" in state:
        kept["add_prefix_space"] = state["add_prefix_space"]
    kept["added_tokens_decoder"] = {
        str(index): {"content": token.content} | {flag: getattr(token, flag) for flag in _FLAGS}
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    return kept


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    changed = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
