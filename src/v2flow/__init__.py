"""v2flow: an image tokenizer whose visual tokens live in the vocabulary space of a pretrained LLM.

`import v2flow` is cheap: PyTorch is imported only when a public name is first used.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from v2flow.config import TokenizerConfig
    from v2flow.errors import V2FlowError
    from v2flow.t2i.text_to_image import V2FlowForTextToImage
    from v2flow.tokenizer import SoftTokens, V2FlowTokenizer

__all__ = [
    "SoftTokens",
    "TokenizerConfig",
    "V2FlowError",
    "V2FlowForTextToImage",
    "V2FlowTokenizer",
    "__version__",
]

_HOMES = {
    "SoftTokens": "v2flow.tokenizer",
    "TokenizerConfig": "v2flow.config",
    "V2FlowError": "v2flow.errors",
    "V2FlowForTextToImage": "v2flow.t2i.text_to_image",
    "V2FlowTokenizer": "v2flow.tokenizer",
}
_EXTRAS = {"transformers", "tokenizers", "peft", "accelerate"}
"""What only the extra `t2i` installs."""

try:
    __version__ = version("v2flow")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Imports the module of a public name when the name is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'v2flow' has no attribute {name!r}")
    try:
        value = getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        errors = import_module("v2flow.errors")
        raise errors.V2FlowError(f"{name} {errors.missing(error.name, 't2i')}") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
