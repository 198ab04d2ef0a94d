"""The notebooks in ``examples/`` run from beginning to end, and are kept without outputs."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def texts(notebook: Any) -> str:
    """Everything the code cells have printed."""
    return "".join(output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)


def pictures(notebook: Any) -> int:
    """How many pictures the code cells show."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert texts(notebook) == "" and pictures(notebook) == 0
    assert all(cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_your_own_images_become_a_model_and_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(EXAMPLES / "your_own_images.ipynb", as_version=4)
    for cell in notebook.cells:  # the trainings are shorter than a reader's
        cell.source = re.sub(r'steps": \d00\b', 'steps": 20', cell.source)
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    shown = texts(notebook)
    assert "version 1 is the champion" in shown
    assert "'read': 165, 'accepted': 160, 'rejected': 5" in shown
    assert re.search(r"^out\.png: seed \d+", shown, re.MULTILINE)
    assert pictures(notebook) == 5  # the collection, reconstructions, samples, the generated image, the loss curve
    [project] = tmp_path.glob("cm3leon-*")
    assert (project / "models/evaluation/record.json").is_file()
