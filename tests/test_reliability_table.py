"""The tables of docs/reliability.md: every row has its columns and a test, and every test that is named exists."""

import ast
import re
from functools import cache
from pathlib import Path

COLUMNS = ["fault", "promise", "test", "reference release", "Lightning + webdataset", "MosaicML Streaming"]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows(repository: Path) -> list[list[str]]:
    lines = (repository / "docs" / "reliability.md").read_text().splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert found.count(COLUMNS) == 4
    return [row for row in found if row != COLUMNS and set(row) != {"---"}]


@cache
def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_row_is_whole_and_has_a_test(repository: Path) -> None:
    table = rows(repository)
    assert len(table) > 30
    for row in table:
        assert len(row) == len(COLUMNS) and all(row), row
        assert NAMED.findall(row[2]), f"no test for: {row[0]}"


def test_every_named_test_exists(repository: Path) -> None:
    named = NAMED.findall((repository / "docs" / "reliability.md").read_text())
    lacking = [
        f"{file}::{name}"
        for file, name in named
        if not (repository / file).is_file() or name not in functions_of(repository / file)
    ]
    assert lacking == []


def test_every_fault_that_is_tried_is_in_the_table(repository: Path) -> None:
    faults = functions_of(repository / "tests/faults/test_data_faults.py") - {"differences"}
    named = {name for _, name in NAMED.findall((repository / "docs" / "reliability.md").read_text())}
    assert faults <= named
