"""A version keeps the dvc.lock and params.yaml that it was made with, and brings them back."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from registry_support import evaluated, released

from cm3leon.registry.bundle import bundle_hash
from cm3leon.registry.checkout import CheckoutError, restore_lock
from cm3leon.registry.registry import NotRegisteredError

LOCK, PARAMS = Path("dvc.lock"), Path("params.yaml")


def write(text: str) -> None:
    LOCK.write_text(f"stages: {{}}  # {text}\n")
    PARAMS.write_text(f"profile: tiny  # {text}\n")


@pytest.mark.slow
def test_the_files_of_any_version_come_back(stages: Path) -> None:
    for text, composition in (("first", 0.5), ("second", 0.6)):
        write(text)
        released(composition)
    assert restore_lock("1").number == "1"
    assert "first" in LOCK.read_text() and "first" in PARAMS.read_text()
    assert restore_lock("@champion").number == "2"
    assert "second" in LOCK.read_text() and "second" in PARAMS.read_text()
    with pytest.raises(NotRegisteredError, match="no version 3 of cm3leon; it has: 2, 1, @challenger, @champion, @previous_champion"):
        restore_lock("3")

    # What is kept nowhere else is not lost; what git has is replaced.
    write("mine")
    with pytest.raises(CheckoutError, match=r"dvc.lock and params.yaml would be replaced and is kept nowhere else"):
        restore_lock("1")
    assert "mine" in LOCK.read_text() and "mine" in PARAMS.read_text()
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run(["git", "add", str(LOCK), str(PARAMS)], check=True)
    subprocess.run(["git", "-c", "user.name=me", "-c", "user.email=me@here", "commit", "--quiet", "--no-verify", "-m", "mine"], check=True)
    restore_lock("1")
    assert "first" in LOCK.read_text()
    PARAMS.write_text("changed")
    with pytest.raises(CheckoutError, match=r"^params.yaml would be replaced"):
        restore_lock("2")


def test_they_are_copies_and_no_part_of_the_models_identity(stages: Path) -> None:
    """DVC writes its lock in place, so a hard link would change in the bundle."""
    write("before")
    bundle = evaluated(0.5).path
    identity = bundle_hash(bundle)
    write("after")
    assert "before" in (bundle / "dvc.lock").read_text()
    assert bundle_hash(evaluated(0.5).path) == identity


def test_a_version_that_was_made_without_dvc_says_so(stages: Path) -> None:
    released(0.5)
    with pytest.raises(CheckoutError, match=r"version 1 was registered without dvc\.lock"):
        restore_lock("1")
