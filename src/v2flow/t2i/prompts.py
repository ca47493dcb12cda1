"""Captions from files, and pictures of captions on disk: a plain folder, or the one that GenEval's evaluator reads."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v2flow.errors import V2FlowError


@dataclass(frozen=True)
class Prompt:
    """A caption.

    Attributes:
        caption: its text.
        record: the JSON object that it came with, as GenEval's prompt file has one a line; None for a plain caption.
    """

    caption: str
    record: dict[str, Any] | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """Captions of a text file, one a line, or of a .jsonl file of objects with the key "prompt"; blank lines are none.

    Raises:
        V2FlowError: missing, not UTF-8, empty, or a line of a .jsonl file that is no such object.
    """
    try:
        # Not splitlines, which also ends lines at characters that JSON texts may hold; a byte order mark is no caption.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise V2FlowError(
            f"{path}: no such file; expected captions, one a line, or GenEval's .jsonl prompts"
        ) from error
    except UnicodeDecodeError as error:
        raise V2FlowError(
            f"{path}: expected UTF-8 text, found something else; name a file of captions"
        ) from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise V2FlowError(f"{path}: expected at least one caption, found none")
    if path.suffix != ".jsonl":
        return [Prompt(line) for _, line in numbered]
    return [_read_record(line, f"{path}, line {number}") for number, line in numbered]


def _read_record(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise V2FlowError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise V2FlowError(f'{where}: expected a JSON object with the text "prompt", found {line[:60]}')
    return Prompt(record["prompt"], record)


def picture_name(index: int, caption: str) -> str:
    """File name of picture `index`: ``0003-two-green-apples.png``; unlike another index's, and in order."""
    slug = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:48].rstrip("-")
    return f"{index:04d}-{slug}.png" if slug else f"{index:04d}.png"


def check_geneval(prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that GenEval's evaluator cannot score: it needs the task and the objects of each.

    Raises:
        V2FlowError: the first such prompt.
    """
    for index, prompt in enumerate(prompts):
        missing = next((key for key in ("tag", "include") if key not in (prompt.record or {})), None)
        if missing is not None:
            raise V2FlowError(
                f"option --geneval: prompt {index} ({prompt.caption[:40]!r}): expected the key {missing!r}, found "
                "none; give GenEval's evaluation_metadata.jsonl as --prompts"
            )


def geneval_picture(folder: Path, prompt: int, sample: int) -> Path:
    """Where GenEval's evaluator looks for a picture: ``00007/samples/0001.png``."""
    return folder / f"{prompt:05d}" / "samples" / f"{sample:04d}.png"


def write_geneval_records(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Writes each prompt's record beside its pictures: ``00007/metadata.jsonl``, one line."""
    for index, prompt in enumerate(prompts):
        path = folder / f"{index:05d}" / "metadata.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(prompt.record) + "\n")
