"""Names of shards: brace globs, wildcards, local files, `file:`, `http(s):` and, if allowed, `pipe:`."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import braceexpand

from v2flow.errors import V2FlowError

Shards = str | Sequence[str]
SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):")


def expand_shards(shards: Shards, allow_pipe: bool = False) -> list[str]:
    """Names of single shards: braces `{00..12}` and `{a,b}` everywhere, wildcards `*?[]` in local paths.

    Args:
        shards: one pattern or several.
        allow_pipe: also accept `pipe:COMMAND`, whose output is a tar. It runs in a shell.

    Raises:
        V2FlowError: no match, an unknown scheme, a shard named twice, or a pipe that is not allowed.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    names = [name for pattern in patterns for name in _expand_one(pattern, allow_pipe)]
    if not names:
        raise V2FlowError("shards: expected at least one path or URL, found none")
    twice = (
        next((name for name in names if names.count(name) > 1), None)
        if len(set(names)) < len(names)
        else None
    )
    if twice is not None:
        raise V2FlowError(f"{twice}: named twice among the shards; name each shard once")
    return names


def _expand_one(pattern: str, allow_pipe: bool) -> list[str]:
    try:
        names = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise V2FlowError(
            f"shards {pattern!r}: a brace is not closed; expected e.g. train-{{000..012}}.tar"
        ) from error
    return [name for expanded in names for name in _expand_name(expanded, allow_pipe)]


def _expand_name(name: str, allow_pipe: bool) -> list[str]:
    match = SCHEME.match(name)
    scheme = match.group(1).lower() if match else ""
    if scheme == "pipe":
        if not allow_pipe:
            raise V2FlowError(f"{name}: pipes run a shell command; set allow_pipe to true if you trust it")
        return [name]
    if scheme in ("http", "https"):
        if "*" in name:
            raise V2FlowError(f"{name}: wildcards only work for local shards; use braces {{000..012}}")
        return [name]
    if scheme == "file":
        try:
            name = url2pathname(urlparse(name).path)
        except ValueError as error:
            raise V2FlowError(f"{name}: no URL of a file ({error}); write its path instead") from error
    elif scheme:
        raise V2FlowError(
            f"{name}: unknown scheme {scheme!r}; expected a path, file:, http:, https: or pipe:"
        )
    if os.path.exists(name) or not glob.has_magic(name):
        return [name]
    found = sorted(glob.glob(name, recursive=True))
    if not found:
        raise V2FlowError(f"{name}: no shard matches; check the path, or build the shards first")
    return found


def shard_places(shards: Shards, allow_pipe: bool = False) -> set[str]:
    """Where shards lie, local ones by their real path: two names of one shard are one place.

    Raises:
        V2FlowError: see :func:`expand_shards`.
    """
    names = expand_shards(shards, allow_pipe)
    return {os.path.realpath(name) if os.path.exists(name) else name for name in names}


def folder_of(name: str) -> str:
    """Folder of a shard, local or by its URL."""
    return name.rpartition("/")[0] if "://" in name else str(Path(name).parent)
