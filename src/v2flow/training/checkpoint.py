"""Loading a trained model from a Lightning checkpoint or an exported folder."""

import importlib
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from v2flow.config import from_dict
from v2flow.errors import V2FlowError
from v2flow.hub import (
    WEIGHTS,
    check_codec,
    check_vocabulary,
    load_weights,
    makes_a,
    read_config,
    read_weights,
)
from v2flow.training.checkpoint_files import usable_checkpoint
from v2flow.training.own_tokenizer import is_own, load_own

if TYPE_CHECKING:
    from v2flow.tokenizer import V2FlowTokenizer


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """The contents of a Lightning checkpoint made by v2flow; plain types and tensors only.

    A damaged file gives way to the one that it replaced, with one warning; see `usable_checkpoint`.

    Args:
        mmap: leave the tensors on disk until they are used: for a look at what a checkpoint says of itself. The file's
            checksum is not computed.

    Raises:
        V2FlowError: missing, damaged, holding other objects than tensors and plain types, or somebody else's.
    """
    path = usable_checkpoint(path, quick=mmap)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise V2FlowError(
            f"{path}: not a readable checkpoint ({reason}); is it cut short or foreign?"
        ) from error
    if not isinstance(checkpoint, dict) or "v2flow" not in checkpoint:
        raise V2FlowError(
            f"{path}: not a v2flow checkpoint (no entry 'v2flow'); expected one made by `v2flow fit`"
        )
    return checkpoint


def model_weights(checkpoint: dict[str, Any], weights: Literal["ema", "raw"]) -> dict[str, torch.Tensor]:
    """The model's tensors: averaged ones are the checkpoint's `state_dict`, raw ones are kept beside them.

    Without weight averaging in the training both are the same.
    """
    state = checkpoint["state_dict"]
    if weights == "raw":
        state = checkpoint.get("current_model_state", state)
    return {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}


_MODELS = {
    "V2FlowTokenizer": ("v2flow.tokenizer", "TokenizerConfig"),
    "VQAutoencoder": ("v2flow.baselines.vq_autoencoder", "VQAutoencoderConfig"),
    "TiTokAutoencoder": ("v2flow.baselines.titok", "TiTokConfig"),
}
"""Names of models in checkpoints, the modules that hold them, and their configurations there."""


def build_model(info: dict[str, Any], where: str) -> nn.Module:
    """The model that a checkpoint's description names, with fresh weights.

    Raises:
        V2FlowError: a model that is not in the list of v2flow's own, or a configuration that makes none.
    """
    name = info.get("model")
    if not isinstance(name, str) or name not in _MODELS:
        raise V2FlowError(f"{where}: unknown model {name!r}; expected one of {', '.join(_MODELS)}")
    place, config = _MODELS[name]
    module = importlib.import_module(place)
    with makes_a(name, where):
        model = getattr(module, name)(from_dict(getattr(module, config), info["config"], where))
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
    info = dict(checkpoint["v2flow"])
    built = build_model(info, str(path))
    load_weights(built, model_weights(checkpoint, weights), str(path))
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
        info, weights = checkpoint["v2flow"], model_weights(checkpoint, "ema")
    trained: Any = model
    if hasattr(model, "vocabulary_sha256"):
        check_vocabulary(trained.vocabulary_sha256, info.get("vocabulary_sha256"), str(path))
    check_codec(trained.codec.fingerprint(), info.get("codec_sha256"), str(path))
    load_weights(model, weights, str(path))
