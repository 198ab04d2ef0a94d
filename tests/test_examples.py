"""The notebooks in ``examples/`` run from beginning to end, and are kept without outputs."""

import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from cm3leon.config import paths

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


def execute(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Execute a notebook; returns its scratch copy of the project."""
    from nbclient import NotebookClient

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    [project] = tmp_path.glob("cm3leon-*")
    return project


@pytest.mark.slow
@pytest.mark.skipif("CM3LEON_REAL_DATA" not in os.environ, reason="CM3LEON_REAL_DATA does not point to the collections")
@pytest.mark.parametrize(
    ("name", "checked", "report"),
    [
        ("icons", ["caption", "text_to_image"], {"read": 1609, "accepted": 1608, "rejected": 1}),
        ("photographs", ["caption", "layout_to_image"], {"read": 100, "accepted": 100, "rejected": 0}),
    ],
)
def test_a_real_collection_is_checked_and_validated(
    name: str, checked: list[str], report: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a notebook trains afterwards takes minutes."""
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    monkeypatch.setenv("CM3LEON_REAL_DATA", str(Path(os.environ["CM3LEON_REAL_DATA"]).resolve()))
    [pipeline] = [number for number, cell in enumerate(notebook.cells) if "flows.pipeline" in cell.source]
    notebook.cells = notebook.cells[:pipeline]
    notebook.cells.append(nbformat.v4.new_code_cell('run("cm3leon", "ingest")\nrun("cm3leon", "validate")'))
    project = execute(notebook, tmp_path, monkeypatch)
    shown = texts(notebook)
    assert all(f"{task} " in shown for task in checked)
    assert "records read, nothing written" in shown
    found = json.loads((project / "data/validated/report.json").read_text())
    assert {key: found[key] for key in report} == report
    assert "Passed" in (project / paths.DATA_REPORT).read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_your_own_images_become_a_model_and_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(EXAMPLES / "your_own_images.ipynb", as_version=4)
    for cell in notebook.cells:  # the trainings are shorter than a reader's
        cell.source = re.sub(r'steps": \d00\b', 'steps": 20', cell.source)
    project = execute(notebook, tmp_path, monkeypatch)
    shown = texts(notebook)
    assert "version 1 is the champion" in shown
    assert "'read': 165, 'accepted': 160, 'rejected': 5" in shown
    assert re.search(r"^out\.png: seed \d+", shown, re.MULTILINE)
    assert pictures(notebook) == 5  # the collection, reconstructions, samples, the generated image, the loss curve
    assert (project / "models/evaluation/record.json").is_file()
