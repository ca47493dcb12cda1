"""The notebooks: stored without outputs, and run from top to bottom as a reader finds them."""

import copy
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FINALLY = {
    "tokenizer": """
assert psnr_per_image(images, decoded).mean() > psnr_per_image(images, mean).mean()
assert ids.unique().numel() > 20 and len(moments) == 16
assert share[-1] > 0.999 and soft.entropy.max() <= most + 1e-4
""",
    "text_to_image": """
assert losses[-1] < losses[0] - 0.5
assert scores["true pictures"] == 1.0
assert 0 <= scores["drawn"] <= 1 and drawn.shape == real.shape
""",
}
"""What holds after the last cell, run in the notebook's own process."""


def stored(notebook: Any) -> list[str]:
    """Ids of the cells that hold what a run has left."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        cell.id
        for cell in cells
        if cell.outputs or cell.execution_count is not None or "execution" in cell.metadata
    ]


def test_each_notebook_is_tested() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(["text_to_image", "tokenizer"]) == sorted(FINALLY)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_of_a_run_is_stored(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert stored(notebook) == [] and "widgets" not in notebook.metadata
    ran = copy.deepcopy(notebook)
    first = next(cell for cell in ran.cells if cell.cell_type == "code")
    first.outputs = [nbformat.v4.new_output("stream", text="1")]
    assert stored(ran) == [first.id], "the check can fail"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        lines = cell.source.splitlines()
        assert len(lines) <= 35 and max(map(len, lines)) <= 140, cell.source


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_as_it_stands(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, so that what it builds lies there; without a network."""
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    folder = tmp_path / "notebooks"
    folder.mkdir()
    notebook = nbformat.read(path, as_version=4)
    shown = sum("show(" in cell.source.splitlines()[-1] for cell in notebook.cells if cell.source)
    notebook.cells.append(nbformat.v4.new_code_cell(FINALLY[path.stem]))
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == shown > 2
