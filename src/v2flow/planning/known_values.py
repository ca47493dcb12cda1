"""The values that a step on fake tensors needs all the same.

How many positions a mask leaves visible decides the shapes of what follows. Such numbers come from random draws and
counting alone, never from weights or pictures, so they are computed beside the fake tensors.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

LIMIT = 1 << 18  # elements of a tensor whose values are worth following

aten = torch.ops.aten
_UNSET = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


class KnownValues:
    """Real values of the fake tensors that depend on nothing but shapes and random draws.

    Args:
        given: further fake tensors, each with its value: the flags and counters among a module's buffers.
    """

    def __init__(self, given: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        self._known: dict[int, tuple[Any, Tensor]] = {}
        for x, value in given:
            self._keep(x, value.detach().clone())

    def follow(
        self, operator: Any, args: Any, kwargs: dict[str, Any], inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """Run an operator on values as well if those of all inputs are known; else its outputs have none."""
        set_here = operator._overloadpacket not in _UNSET and all(isinstance(x, FakeTensor) for x in outputs)
        small = sum(x.numel() for x in outputs) <= LIMIT
        if not (set_here and small and all(self._is_known(x) for x in inputs)):
            for x in outputs:
                self._known.pop(id(x), None)
            return
        with _disable_current_modes():
            values = operator(*self._real(args), **self._real(kwargs))
        for x, value in zip(outputs, tensors_in(values), strict=True):
            self._keep(x, value)

    def scalar(self, x: Tensor) -> Any:
        """The one value of `x`; zero where it depends on weights or pictures: no code is dead, nothing overflows."""
        known = self._known[id(x)][1] if id(x) in self._known else x
        value = known.constant if isinstance(known, FakeTensor) else known
        if value is not None:
            with _disable_current_modes():
                return value.item()
        return 0.0 if x.is_floating_point() else 0

    def _is_known(self, x: Tensor) -> bool:
        return id(x) in self._known or not isinstance(x, FakeTensor)

    def _real(self, tree: Any) -> Any:
        return tree_map_only(Tensor, lambda x: self._known[id(x)][1] if id(x) in self._known else x, tree)

    def _keep(self, x: Tensor, value: Tensor) -> None:
        key = id(x)
        self._known[key] = weakref.ref(x, lambda _: self._known.pop(key, None)), value


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries, in order."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
