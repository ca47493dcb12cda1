"""Writing result files so that no half-written file ever stands under its final name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from v2flow.paths import atomic_path


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Lets `write` fill a temporary file beside `path`, then renames it; makes the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        write(file)


def write_json(path: str | Path, value: Any) -> None:
    """Writes strict JSON (no NaN), indented, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(Path(path), lambda file: file.write(text.encode()))


def append_json_line(path: Path, value: Any) -> None:
    """Adds strict JSON on a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(value, allow_nan=False) + "\n")
