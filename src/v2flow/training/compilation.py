"""`compile: true`: parts of a model under torch.compile, each of which falls back where it cannot be compiled."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from v2flow.errors import first_line

_log = logging.getLogger(__name__)


def compile_parts(parts: Mapping[str, nn.Module], dynamic: bool, backend: str = "inductor") -> None:
    """Compile modules in place, at their next call; names of parameters stay, and copies are not compiled.

    Each is tried on the inputs of that call, forward and backward, before it is used: where that fails, one warning
    says why, and the call and all later ones run as they would have. Nothing of a training step is lost, as the parts
    must neither draw random numbers nor change buffers.

    Args:
        parts: by the name that a warning gives them.
        dynamic: once for all shapes, or for each shape anew.
        backend: of torch.compile.
    """
    for name, part in parts.items():
        # Where nn.Module.compile puts what it calls in place of forward; no copy or checkpoint has it.
        part._compiled_call_impl = _FirstCall(name, part, {"dynamic": dynamic, "backend": backend})


class _FirstCall:
    """Stands in a module's place for one call; see `compile_parts`."""

    def __init__(self, name: str, part: nn.Module, options: dict[str, Any]) -> None:
        self._name, self._part, self._options = name, part, options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._part.compile(**self._options)
        try:
            _try(self._part, args, kwargs)
        except Exception as error:  # a compiler can fail in any way, and is never needed
            self._part._compiled_call_impl = None
            _log.warning(
                "option compile: %s is not compiled, and runs as without: %s", self._name, _reason(error)
            )
        return self._part(*args, **kwargs)


def _try(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward and, where gradients are wanted, backward, which leaves no gradient in any parameter."""
    args, kwargs = tree_map(_leaf, (args, kwargs))
    out = part(*args, **kwargs)
    if not out.requires_grad:
        return
    inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    wanted = [x for x in (*inputs, *part.parameters()) if x.requires_grad]
    torch.autograd.grad(out.float().sum(), wanted, allow_unused=True)


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _reason(error: BaseException) -> str:
    """The line of the compiler's own error, not of those that dynamo packs it into."""
    while True:
        inner = getattr(error, "inner_exception", None) or error.__cause__
        if inner is None:
            return f"{type(error).__name__}: {first_line(error)}"
        error = inner
