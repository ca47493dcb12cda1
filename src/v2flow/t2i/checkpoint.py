"""Loading a text-to-image model from a Lightning checkpoint, which holds only what was trained."""

from pathlib import Path
from typing import Any

from torch import Tensor

from v2flow.config import from_dict
from v2flow.downloads import no_downloads
from v2flow.errors import V2FlowError
from v2flow.fingerprint import language_model_sha256, tokenizer_sha256
from v2flow.hub import makes_a
from v2flow.t2i.build import build_text_to_image
from v2flow.t2i.config import TextToImageConfig
from v2flow.t2i.text_to_image import V2FlowForTextToImage


def read_text_to_image(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint says of its model, and the trained tensors by name.

    Raises:
        V2FlowError: not readable, or another model's.
    """
    from v2flow.training.checkpoint import needed, read_checkpoint

    checkpoint = read_checkpoint(path)
    info = dict(checkpoint["v2flow"])
    if info.get("model") != "V2FlowForTextToImage":
        raise V2FlowError(f"{path}: expected a text-to-image checkpoint, found a {info.get('model')}")
    for name in ("config", "tokenizer_sha256", "llm_sha256"):
        needed(info, name, str(path))
    return info, needed(checkpoint, "state_dict", str(path))


def load_text_to_image(path: str | Path, tokenizer: str | None = None) -> V2FlowForTextToImage:
    """The model of a checkpoint of `v2flow fit`, in evaluation mode on the CPU.

    Args:
        path: a .ckpt file or a sharded checkpoint, or a folder made by `v2flow export`.
        tokenizer: where the V2Flow tokenizer lies now, if not where it lay in training.

    Raises:
        V2FlowError: not such a checkpoint, or its tokenizer or LLM is missing or has changed.
    """
    from v2flow.training.checkpoint_files import is_sharded

    if Path(path).is_dir() and not is_sharded(path):
        model: V2FlowForTextToImage = V2FlowForTextToImage.from_pretrained(path)
        return model
    info, weights = read_text_to_image(path)
    # The rows come from the checkpoint: any start will do, and random needs no pictures.
    values = info["config"] | {"rows": "random", "pictures": None}
    values |= {"tokenizer": tokenizer} if tokenizer is not None else {}
    with makes_a("V2FlowForTextToImage", str(path)), no_downloads():
        config: TextToImageConfig = from_dict(TextToImageConfig, values, str(path))
        model = build_text_to_image(config, info.get("llm_tokenizer"))
    for what, name, found in (
        ("tokenizer", config.tokenizer, tokenizer_sha256(model.tokenizer)),
        ("llm", config.llm, language_model_sha256(model.llm)),
    ):
        if found != info[f"{what}_sha256"]:
            raise V2FlowError(
                f"{path}: trained with the {what} {info[f'{what}_sha256'][:12]}, found {found[:12]} at {name}; put "
                "back the one that it was trained with"
            )
    _load(model, {name.removeprefix("model."): tensor for name, tensor in weights.items()}, str(path))
    return model.eval()


def _load(model: V2FlowForTextToImage, weights: dict[str, Tensor], where: str) -> None:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name in sorted(parameters.keys() | weights.keys()):
        if name not in parameters or name not in weights or parameters[name].shape != weights[name].shape:
            raise V2FlowError(
                f"{where}: tensor {name!r} does not fit the model that the checkpoint describes"
            )
    with makes_a("V2FlowForTextToImage", where):
        model.load_state_dict(weights, strict=False)
