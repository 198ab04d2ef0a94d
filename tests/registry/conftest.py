"""A project whose stages have run."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def stages(project: Path, tiny_models: Path) -> Path:
    """The project with the outputs of all stages."""
    for name in ("models", "data"):
        shutil.copytree(tiny_models / name, project / name)
    return project
