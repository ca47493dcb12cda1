"""Named ways to decode: those of a checkpoint, presets from a measured frontier, and those that a user writes out."""

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib import resources
from typing import Any

from v2flow.decoding import DecodeOptions, decode_options
from v2flow.errors import V2FlowError

PRESETS = ("fast", "balanced", "best")
"""From the cheapest to the most realistic; which settings they stand for is measured, never chosen here."""
Presets = Mapping[str, Mapping[str, Any]]
"""Preset -> options of `decode`."""


@cache
def shipped_presets() -> Presets:
    """The presets of tokenizers that bring none of their own, from ``decode_presets.json`` of this package."""
    document = json.loads(
        resources.files("v2flow").joinpath("decode_presets.json").read_text(encoding="utf-8")
    )
    return read_presets(document, "v2flow/decode_presets.json")


def read_presets(document: Any, where: str) -> Presets:
    """Presets of a document as ``benchmarks/decoding_frontier.py`` writes it: {"presets": {name: {"options": …}}}.

    Raises:
        V2FlowError: other names than `PRESETS`, or options that decoding does not have.
    """
    presets = document.get("presets") if isinstance(document, Mapping) else None
    if not isinstance(presets, Mapping) or sorted(presets) != sorted(PRESETS):
        found = list(presets) if isinstance(presets, Mapping) else presets
        raise V2FlowError(
            f"{where}: expected presets {', '.join(PRESETS)}, found {found}; measure them again"
        )
    try:
        options = {name: checked(dict(presets[name]["options"])) for name in PRESETS}
    except (KeyError, TypeError, ValueError) as error:
        raise V2FlowError(f"{where}: presets: expected options of decode, found {error}") from error
    return options


def read_modes(modes: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """A checkpoint's ways to decode, name -> options; the first one is its default.

    Raises:
        V2FlowError: no names and options, or options that decoding does not have.
    """
    found = {}
    for name, options in modes.items():
        if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in (name, *options)):
            raise V2FlowError(
                f"{where}: decode_modes: expected options of decode by name, found {name!r}: {options!r}"
            )
        try:
            found[name] = checked(options)
        except V2FlowError as error:
            raise V2FlowError(f"{where}: decode_modes: {name}: {error}") from error
    return found


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `decode` that somebody wrote: with values of any type.

    Raises:
        V2FlowError: an unknown name, or a value of another type or out of range.
    """
    for name, default in asdict(DecodeOptions()).items():
        value = options.get(name, default)
        if not _same_kind(value, default):
            raise V2FlowError(f"decode option {name}: expected a value such as {default}, found {value!r}")
    decode_options(dict(options))
    return dict(options)


def _same_kind(value: Any, default: Any) -> bool:
    if isinstance(default, list):
        return isinstance(value, list) and all(_same_kind(part, 0.0) for part in value)
    if isinstance(default, float):
        return type(value) in (int, float) and abs(value) < math.inf
    return type(value) is type(default)


def presets_of(model: Any) -> Presets:
    """A tokenizer's presets; none of a model that decodes in one way."""
    return getattr(model, "decode_presets", {})


def preset_options(presets: Presets, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the preset `name`.

    Raises:
        V2FlowError: no such preset, or `options` of the user's beside it.
    """
    if name not in presets:
        raise V2FlowError(f"option preset: expected one of {', '.join(presets)}, found {name!r}")
    if options:
        raise V2FlowError(
            f"options preset and {next(iter(options))}: expected one of them; {name} stands for {dict(presets[name])}"
        )
    return dict(presets[name])


def takes_generator(model: Any) -> bool:
    """Whether a tokenizer's `decode` draws noise, from a `generator` that it is given."""
    return "generator" in inspect.signature(model.decode).parameters


def select_modes(
    wanted: Sequence[str] | Mapping[str, Mapping[str, Any]] | None,
    known: Mapping[str, Mapping[str, Any]],
    presets: Presets | None = None,
) -> dict[str, dict[str, Any]]:
    """Decode modes by name -> options.

    Args:
        wanted: names among `known` and `presets`, modes written out (``steps=8,temperature=0.5``), modes themselves,
            or None for all of `known`.
        known: the checkpoint's own modes.
        presets: the tokenizer's presets, see `presets_of`.

    Raises:
        V2FlowError: a name that is neither, or an option that decoding does not have.
    """
    if wanted is None or isinstance(wanted, Mapping):
        return {name: dict(options) for name, options in (known if wanted is None else wanted).items()}
    chosen = {}
    known = dict(known) | {name: options for name, options in (presets or {}).items() if name not in known}
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
    """`steps=8,solver=heun,guidance_interval=0.2:0.8` as options, checked."""
    options: dict[str, Any] = {}
    for part in mode.split(","):
        name, _, text = part.partition("=")
        options[name] = [_value(t) for t in text.split(":")] if ":" in text else _value(text)
    return checked(options)


def _value(text: str) -> int | float | str:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        return text
