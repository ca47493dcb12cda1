"""Named ways to decode: those of a checkpoint, and those that a user writes out."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from v2flow.decoding import decode_options
from v2flow.errors import V2FlowError


def takes_generator(model: Any) -> bool:
    """Whether a tokenizer's `decode` draws noise, from a `generator` that it is given."""
    return "generator" in inspect.signature(model.decode).parameters


def select_modes(
    wanted: Sequence[str] | Mapping[str, Mapping[str, Any]] | None,
    known: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Decode modes by name -> options.

    Args:
        wanted: names among `known`, modes written out (``steps=8,temperature=0.5``), modes themselves, or None for
            all of `known`.
        known: the checkpoint's own modes.

    Raises:
        V2FlowError: a name that is not among `known`, or an option that decoding does not have.
    """
    if wanted is None or isinstance(wanted, Mapping):
        return {name: dict(options) for name, options in (known if wanted is None else wanted).items()}
    chosen = {}
    for name in wanted:
        if "=" in name:
            chosen[name] = _written_out(name)
        elif name in known:
            chosen[name] = dict(known[name])
        else:
            raise V2FlowError(
                f"option modes: unknown decode mode {name!r}; expected some of {', '.join(known)}, "
                "or one written out such as steps=8,temperature=0.5"
            )
    return chosen


def _written_out(mode: str) -> dict[str, Any]:
    """`steps=8,solver=heun` as options, checked."""
    options: dict[str, Any] = {}
    for part in mode.split(","):
        name, _, text = part.partition("=")
        try:
            options[name] = int(text) if text.isdigit() else float(text)
        except ValueError:
            options[name] = text
    decode_options(options)
    return options
