"""What a newcomer and continuous integration rely on: docstrings, make targets, the guides' paths, and one list of dependencies."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
MODULES = sorted(path for package in ("cm3leon", "flows", "benchmarks") for path in (ROOT / package).rglob("*.py"))
GUIDES = ("ARCHITECTURE.md", "CONTRIBUTING.md")
PAGES = sorted(path for folder in (ROOT, ROOT / "docs", ROOT / "examples", ROOT / "data/source") for path in folder.glob("*.md"))
LINK = re.compile(r"\]\(((?!https?:|mailto:)[^)\s]+)\)")
TARGET = re.compile(r"\bmake ([a-z-]+)")
PLACE = re.compile(r"`((?:cm3leon|flows|tests|configs|docs|examples|benchmarks)/[a-z0-9_./-]*)`")


def targets() -> set[str]:
    """What the Makefile can make."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands() -> list[str]:
    """The shell commands of the workflow, job by job."""
    return [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_public_module_says_what_it_is_for(path: Path) -> None:
    if not path.stem.startswith("_") or path.stem == "__init__":
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring at its top"


def test_make_help_lists_every_target_once() -> None:
    text = (ROOT / "Makefile").read_text()
    described = re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE)
    [phony] = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert sorted(described) == sorted(phony.split()) == sorted(targets())


def test_continuous_integration_runs_the_targets_of_a_developers_machine() -> None:
    assert all(command.startswith("make ") for command in commands())
    called = {target for command in commands() for target in TARGET.findall(command)}
    assert called <= targets()
    assert set(TARGET.findall((ROOT / ".ci/run").read_text())) <= called
    assert "docs" in called


def test_continuous_integration_may_only_read_and_tries_every_supported_python() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in WORKFLOW["jobs"].values())
    low, high = re.findall(r"3\.(\d+)", PYPROJECT["project"]["requires-python"])
    assert WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(int(low), int(high))]


def test_the_image_installs_the_lock_and_runs_without_rights() -> None:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    instructions = [line.split(" ", 1) for line in lines if re.match(r"[A-Z]+ ", line)]
    names = [name for name, _ in instructions]
    assert ["RUN", "make install"] in instructions
    user = dict(instructions)["USER"]
    assert user not in ("0", "root") and names.index("USER") < names.index("CMD")
    assert set(re.findall(r'"make", "([a-z-]+)"', dict(instructions)["CMD"])) <= targets()
    left_out = {".git", ".venv", ".env*", ".services", ".dvc/config.local", "models", "mlflow.db*"}
    assert left_out <= set((ROOT / ".dockerignore").read_text().split("\n"))


UNLOCKED = {"heic"}
"""Extras that nobody gets unasked: pillow-heif brings x265, which is under the GPL."""


def test_every_dependency_is_locked() -> None:
    project = PYPROJECT["project"]
    extras = {name: wanted for name, wanted in project["optional-dependencies"].items() if name not in UNLOCKED}
    wanted = [*project["dependencies"], *(name for extra in extras.values() for name in extra)]
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    locked = {plain(line) for line in lines}
    assert {plain(requirement) for requirement in wanted} <= locked


def plain(requirement: str) -> str:
    """The normal form of a requirement's name."""
    name = re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("guide", GUIDES)
def test_paths_and_targets_in_the_guides_exist(guide: str) -> None:
    text = (ROOT / guide).read_text()
    places = set(PLACE.findall(text))
    assert places
    assert sorted(place for place in places if not (ROOT / place).exists()) == []
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_to_files_and_headings(page: Path) -> None:
    for link in LINK.findall(without_code(page.read_text())):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{link} does not exist"
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), f"{target.name} has no heading for #{anchor}"


def without_code(text: str) -> str:
    """A page without its code blocks, whose lines may begin as headings do."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may end with, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_index_lists_every_page_of_the_documentation() -> None:
    listed = set(re.findall(r"^\|.*\| \[([a-z-]+\.md)\]", (ROOT / "docs/README.md").read_text(), re.MULTILINE))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_architecture_lists_the_rooms_in_the_order_that_lint_checks() -> None:
    [layers] = [contract["layers"] for contract in PYPROJECT["tool"]["importlinter"]["contracts"] if contract["type"] == "layers"]
    rooms = [layer.replace(".", "/") + "/" for layer in layers]
    listed = re.findall(r"^\| `((?:cm3leon/|flows/|benchmarks/)[a-z]*/?)` \|", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    assert listed == rooms


def test_the_core_imports_on_a_bare_machine_with_a_gpu() -> None:
    """With torch, safetensors, pyarrow and NumPy, and without all other packages that the project needs."""
    code = """
import sys
for package in (
    "pydantic", "prefect", "mlflow", "dvc", "open_clip", "faiss", "great_expectations", "typer", "yaml",
    "PIL", "fastapi", "matplotlib", "networkx", "pandas", "psutil", "requests", "rich", "ruamel", "scipy", "skimage", "sklearn",
    "tokenizers", "torchvision", "transformers",
):
    sys.modules[package] = None
import benchmarks.gpu
import cm3leon.data.prefetch, cm3leon.data.sequences, cm3leon.generation.engine, cm3leon.models.vqgan
import cm3leon.training.memory, cm3leon.training.trainer
del sys.modules["PIL"]  # the upscaler reads and gives images
import cm3leon.models.super_resolution
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
