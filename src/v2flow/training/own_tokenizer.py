"""A tokenizer of the user's own, named as `MODULE:FUNCTION`: the one place that runs code which a word names.

Only words that the user has typed come here, never those of a checkpoint; see `tests/test_unsafe_calls.py`.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from v2flow.errors import V2FlowError


def load_own(name: str) -> nn.Module:
    """A tokenizer of the user's: what `FUNCTION` of `MODULE` returns.

    It is a `torch.nn.Module` with `encode(images [B, 3, S, S] in [0, 1]) -> ids [B, N]`, `decode(ids) -> images`, and
    the attributes `image_size` (S), `num_tokens` (N) and `codebook_size` (K). The module is looked for in the working
    directory as well.

    Args:
        name: `MODULE:FUNCTION`, or `MODULE:FUNCTION=ARGUMENT` to call it with one word.

    Raises:
        V2FlowError: the module or function is not there, or what it returns lacks one of these.
    """
    place, _, argument = name.partition("=")
    module, _, function = place.partition(":")
    try:
        with _working_directory_first():
            build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise V2FlowError(
            f"tokenizer {name}: expected MODULE:FUNCTION that can be imported, but {error}"
        ) from error
    own = build(argument) if argument else build()
    needed = ("encode", "decode", "image_size", "num_tokens", "codebook_size")
    lacking = [part for part in needed if not hasattr(own, part)]
    if lacking or not isinstance(own, nn.Module):
        what = f"no {', '.join(lacking)}" if lacking else type(own).__name__
        raise V2FlowError(
            f"tokenizer {name}: expected a torch.nn.Module with {', '.join(needed)}, found {what}"
        )
    return own.eval()


@contextmanager
def _working_directory_first() -> Iterator[None]:
    """The command `v2flow` does not have the working directory on its path, `python -m` has."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path.remove(str(Path.cwd()))


def is_own(path: str | Path) -> bool:
    """Whether a checkpoint's name is `MODULE:FUNCTION`, a tokenizer of the user's."""
    return ":" in str(path) and not Path(path).exists()
