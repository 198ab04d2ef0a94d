"""A damaged object of DVC's cache is not restored: the stage makes its outputs anew."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
LINES = "".join(f"{number}\n" for number in range(1, 2001))


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A project of one stage, whose output is in the cache and nowhere else; the lines that the stage's runs log."""
    from flows.stage import run_stage

    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "--quiet"], check=True)
    shutil.copytree(ROOT / ".dvc", ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    stage = {"cmd": "mkdir out && seq 1 $(cat count) > out/lines && cp out/lines alone", "deps": ["count"], "outs": ["out", "alone"]}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"count": stage}}))
    Path("count").write_text("2000")
    lines: list[str] = []
    assert run_stage("count", lines.append).state == "Completed"
    remove_outputs()
    return lines


def remove_outputs() -> None:
    shutil.rmtree("out")
    Path("alone").unlink()


def damage(kind: str, change: str) -> None:
    """Truncate, or change a byte of, the object of the file or of the directory, of which DVC notices only the latter."""
    [found] = [path for path in Path(".dvc/cache/files").rglob("*") if path.is_file() and (path.suffix == ".dir") == (kind == "directory")]
    content = found.read_bytes()
    found.chmod(0o644)
    found.write_bytes(content[:10] if change == "truncated" else content.replace(b"1", b"2", 1))
    found.chmod(0o444)  # read-only, as DVC leaves them


@pytest.mark.parametrize("change", ["truncated", "changed"])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_outputs_of_a_damaged_object_are_made_anew(cached: list[str], kind: str, change: str) -> None:
    from flows.stage import run_stage

    damage(kind, change)
    assert run_stage("count", cached.append).state == "Completed"
    assert Path("out/lines").read_text() == Path("alone").read_text() == LINES


def test_a_damaged_object_is_replaced(cached: list[str]) -> None:
    from flows.stage import run_stage

    damage("file", "truncated")
    run_stage("count", cached.append)
    assert "damaged in DVC's cache, made anew: alone, out" in cached
    remove_outputs()
    assert run_stage("count", cached.append).state == "Cached"
    assert Path("out/lines").read_text() == Path("alone").read_text() == LINES


def test_intact_objects_are_restored(cached: list[str]) -> None:
    from flows.stage import run_stage

    assert run_stage("count", cached.append).state == "Cached"
    assert Path("out/lines").read_text() == LINES
    assert not [line for line in cached if "damaged" in line]
