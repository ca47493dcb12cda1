"""A report as plain data, sections of text and tables, which Markdown and HTML then write in their own ways."""

import re
import shlex
from dataclasses import dataclass, field
from typing import TypeAlias

ABSENT = "–"
"""Text of a cell whose figure is not there."""


class Best(str):
    """Text of a table's cell that is printed bold."""


@dataclass(frozen=True)
class Table:
    """Headings, and rows of as many cells."""

    headings: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Bullets:
    """One sentence or two an item."""

    items: list[str]


@dataclass(frozen=True)
class Commands:
    """What was run: a label, and its command lines as words."""

    items: list[tuple[str, list[list[str]]]]


Block: TypeAlias = str | Table | Bullets | Commands


@dataclass(frozen=True)
class Section:
    """A heading and what is under it; a plain string is a paragraph. All text is plain, escaped when written."""

    title: str
    blocks: list[Block] = field(default_factory=list)


def section_markdown(section: Section, level: int = 2) -> str:
    """The section as Markdown, GitHub's dialect."""
    parts = [f"{'#' * level} {escape_markdown(section.title)}"]
    return "\n\n".join(parts + [_block_markdown(block) for block in section.blocks])


def _block_markdown(block: Block) -> str:
    if isinstance(block, Table):
        rows = [block.headings, ["---"] * len(block.headings), *block.rows]
        return "\n".join("| " + " | ".join(_cell_markdown(cell) for cell in row) + " |" for row in rows)
    if isinstance(block, Bullets):
        return "\n".join(f"- {escape_markdown(item)}" for item in block.items)
    if isinstance(block, Commands):
        lines = []
        for label, commands in block.items:
            lines += [f"- {escape_markdown(label)}", *(f"  - {_code(shlex.join(c))}" for c in commands)]
        return "\n".join(lines)
    return escape_markdown(block)


def _cell_markdown(cell: str) -> str:
    text = escape_markdown(cell)
    return f"**{text}**" if isinstance(cell, Best) else text


def escape_markdown(text: str) -> str:
    """Text on one line that Markdown shows as it is, also inside a table."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"[\\`*|<\[\]]", r"\\\g<0>", text)
    text = re.sub(r"&(?=[#\w]+;)", r"\\&", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def _code(text: str) -> str:
    """A code span, fenced by more backticks than the text has in a row."""
    text = text.replace("\n", " ")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"
