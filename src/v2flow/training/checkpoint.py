"""Loading a trained model from a Lightning checkpoint or an exported folder."""

import importlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from v2flow.config import from_dict
from v2flow.decode_modes import read_modes
from v2flow.downloads import no_downloads
from v2flow.errors import V2FlowError, first_line
from v2flow.hub import (
    WEIGHTS,
    check_codec,
    check_sizes,
    check_types,
    check_vocabulary,
    load_weights,
    makes_a,
    read_config,
    read_weights,
)
from v2flow.llm import load_vocabulary
from v2flow.training.checkpoint_files import REST, damage, usable_checkpoint
from v2flow.training.own_tokenizer import is_own, load_own

if TYPE_CHECKING:
    from v2flow.tokenizer import V2FlowTokenizer


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """The contents of a Lightning checkpoint made by v2flow; plain types and tensors only.

    A damaged file gives way to the one that it replaced, with one warning; see `usable_checkpoint`.

    Args:
        mmap: leave the tensors on disk until they are used, those of a sharded checkpoint for good: for a look at what
            a checkpoint says of itself. The file's checksum is not computed.

    Raises:
        V2FlowError: missing, damaged, holding other objects than tensors and plain types, or somebody else's.
    """
    path = usable_checkpoint(path, partial(damage, quick=mmap))
    try:
        if path.is_dir() and not mmap:
            from v2flow.training.checkpoint_folders import read_sharded

            checkpoint = read_sharded(path)
        else:
            file = path / REST if path.is_dir() else path
            checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except V2FlowError:
        raise
    except Exception as error:  # a file of somebody else's may raise anything
        reason = first_line(error)
        raise V2FlowError(
            f"{path}: not a readable checkpoint ({reason}); is it cut short or foreign?"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("v2flow"), dict):
        raise V2FlowError(
            f"{path}: not a v2flow checkpoint (no entry 'v2flow'); expected one made by `v2flow fit`"
        )
    check_types(checkpoint, _ENTRIES, str(path))
    check_types(checkpoint["v2flow"], _DESCRIPTION, str(path))
    for name in ("state_dict", "current_model_state"):
        tensors = checkpoint.get(name) or {}
        if not all(isinstance(k, str) and isinstance(tensor, Tensor) for k, tensor in tensors.items()):
            raise V2FlowError(f"{path}: {name}: expected tensors by name; is it damaged or foreign?")
    return checkpoint


_ENTRIES: dict[str, type] = {"state_dict": dict, "current_model_state": dict, "global_step": int}
_DESCRIPTION: dict[str, type] = {
    "model": str, "config": dict, "decode_modes": dict, "llm_tokenizer": str, "vocabulary_sha256": str,
    "codec_sha256": str, "tokenizer_sha256": str, "llm_sha256": str,
}  # fmt: skip


def needed(entries: dict[str, Any], name: str, where: str) -> Any:
    """An entry of a checkpoint.

    Raises:
        V2FlowError: it is missing.
    """
    if entries.get(name) is None:
        raise V2FlowError(f"{where}: expected an entry {name!r}, found none; is it damaged or foreign?")
    return entries[name]


def model_weights(
    checkpoint: dict[str, Any], weights: Literal["ema", "raw"], where: str
) -> dict[str, torch.Tensor]:
    """The model's tensors: averaged ones are the checkpoint's `state_dict`, raw ones are kept beside them.

    Without weight averaging in the training both are the same.
    """
    state = needed(checkpoint, "state_dict", where)
    if weights == "raw":
        state = checkpoint.get("current_model_state") or state
    return {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}


_MODELS = {
    "V2FlowTokenizer": ("v2flow.tokenizer", "TokenizerConfig"),
    "VQAutoencoder": ("v2flow.baselines.vq_autoencoder", "VQAutoencoderConfig"),
    "TiTokAutoencoder": ("v2flow.baselines.titok", "TiTokConfig"),
}
"""Names of models in checkpoints, the modules that hold them, and their configurations there."""


def build_model(info: dict[str, Any], where: str, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """The model that a checkpoint's description names, with fresh weights.

    Args:
        weights: those that it is built for; compared with what the description asks for before any memory is taken.

    Raises:
        V2FlowError: a model that is not in the list of v2flow's own, or a configuration that makes none.
    """
    name = info.get("model")
    if not isinstance(name, str) or name not in _MODELS:
        raise V2FlowError(f"{where}: unknown model {name!r}; expected one of {', '.join(_MODELS)}")
    place, config_name = _MODELS[name]
    module = importlib.import_module(place)
    kind = getattr(module, name)
    with makes_a(name, where), no_downloads():
        config = from_dict(getattr(module, config_name), needed(info, "config", where), where)
        vocabulary = load_vocabulary(config.vocabulary) if hasattr(config, "vocabulary") else None
        if weights is not None:
            check_sizes(kind, config, vocabulary, weights, where)
        model = kind(config) if vocabulary is None else kind(config, vocabulary)
    if hasattr(model, "vocabulary_sha256"):
        check_vocabulary(model.vocabulary_sha256, info.get("vocabulary_sha256"), where)
    check_codec(model.codec.fingerprint(), info.get("codec_sha256"), where)
    return model


def load_model(
    path: str | Path, weights: Literal["ema", "raw"] = "ema", allow_own: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """A trained model in evaluation mode and what is known of it.

    Args:
        path: a .ckpt file or a folder made by `v2flow export` (which holds one set of weights).
        weights: averaged or raw weights of a .ckpt file.
        allow_own: `path` is a word that the user has typed, and may name a tokenizer of his own, whose code is run;
            see :func:`load_own`. Never for words of a file.

    Returns:
        The model and {"model", "config", "decode_modes", "step"}.
    """
    if allow_own and is_own(path):
        own = load_own(str(path))
        return own, {"model": type(own).__name__, "config": None, "decode_modes": {"own": {}}, "step": None}
    if Path(path).is_dir():
        from v2flow.hub import load_folder
        from v2flow.tokenizer import V2FlowTokenizer

        model = load_folder(V2FlowTokenizer, Path(path))
        return model, {"model": "V2FlowTokenizer", "config": None, "decode_modes": None, "step": None}
    checkpoint = read_checkpoint(path)
    tensors = model_weights(checkpoint, weights, str(path))
    info: dict[str, Any] = {"decode_modes": None} | checkpoint["v2flow"]
    built = build_model(info, str(path), tensors)
    load_weights(built, tensors, str(path))
    if info["decode_modes"] is not None:
        info["decode_modes"] = read_modes(info["decode_modes"], str(path))
    return built.eval(), info | {"step": checkpoint.get("global_step")}


def load_tokenizer(path: str | Path, where: str | None = None) -> "V2FlowTokenizer":
    """The V2Flow tokenizer of a .ckpt file (averaged weights) or an exported folder, in evaluation mode.

    Args:
        where: begins the message when there is another model; `path` by default.

    Raises:
        V2FlowError: none there, or another model.
    """
    from v2flow.tokenizer import V2FlowTokenizer

    tokenizer, info = load_model(path)
    if not isinstance(tokenizer, V2FlowTokenizer):
        raise V2FlowError(f"{where or path}: expected a V2FlowTokenizer, found a {info['model']}")
    return tokenizer


def initialise_from(model: nn.Module, path: str | Path) -> None:
    """Copy the averaged weights of a checkpoint or exported folder into `model` (`--init-from`).

    Raises:
        V2FlowError: weights of other shapes, or trained with another frozen vocabulary or codec.
    """
    if Path(path).is_dir():
        info, weights = read_config(Path(path)), read_weights(Path(path) / WEIGHTS)
    else:
        checkpoint = read_checkpoint(path)
        info, weights = checkpoint["v2flow"], model_weights(checkpoint, "ema", str(path))
    trained: Any = model
    if hasattr(model, "vocabulary_sha256"):
        check_vocabulary(trained.vocabulary_sha256, info.get("vocabulary_sha256"), str(path))
    check_codec(trained.codec.fingerprint(), info.get("codec_sha256"), str(path))
    load_weights(model, weights, str(path))
