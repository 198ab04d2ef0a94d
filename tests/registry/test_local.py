"""A local registry read from its tables says what MLflow says, and leaves to MLflow what it does not know."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from registry_support import released

from cm3leon.registry import registry
from cm3leon.registry.local import find_model, read_versions
from cm3leon.tracking import store

READ = """
import sys
from cm3leon.generation.generator import Generator
from cm3leon.registry import registry
print([version.number for version in registry.status()])
[[image]] = Generator.from_bundle(registry.fetch_bundle()).text_to_image(["a red circle"], candidates=2, retrieved_documents=1)
print(image.retrieved_documents[0]["caption"])
print(sorted({"mlflow", "open_clip", "torchvision", "torch._dynamo", "transformers", "sympy"} & set(sys.modules)))
"""


@pytest.fixture
def versions(stages: Path) -> Path:
    """A registry with three versions: a former champion, the champion, and a challenger that was held back."""
    for composition in (0.5, 0.6, 0.1):
        released(composition)
    return stages


def test_the_tables_say_what_mlflow_says(versions: Path) -> None:
    client = registry.connect()
    assert registry.status() == registry.all_versions(client)
    assert [version.aliases for version in registry.status()] == [["challenger"], ["champion"], ["previous_champion"]]
    for uri in ("models:/cm3leon@champion", "models:/cm3leon/1"):
        found = find_model(store.tracking_uri(), uri)
        assert found == Path(registry._artifact(client, uri))
        assert registry.fetch_bundle(uri).is_relative_to(found)
    client.delete_model_version("cm3leon", "1")
    assert registry.status() == registry.all_versions(client)
    assert [version.number for version in registry.status()] == ["3", "2"]


def test_neither_listing_nor_generating_imports_what_is_slow_to_import(versions: Path) -> None:
    """Each of these takes from half a second to two: more than answering."""
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['3', '2', '1']", "a red circle", "[]"]


def test_what_is_not_a_current_local_store_is_left_to_mlflow(versions: Path, tmp_path: Path) -> None:
    assert read_versions("http://127.0.0.1:5000", "cm3leon") is None
    assert read_versions(f"sqlite:///{tmp_path}/absent.db", "cm3leon") is None
    assert not (tmp_path / "absent.db").exists()
    assert read_versions(store.tracking_uri(), "another") == []
    assert find_model(store.tracking_uri(), "models:/cm3leon@absent") is None
    assert find_model(store.tracking_uri(), "models:/cm3leon/9") is None
    with sqlite3.connect(versions / "mlflow.db") as connection:
        connection.execute("ALTER TABLE model_version_tags RENAME TO of_another_schema")
    assert read_versions(store.tracking_uri(), "cm3leon") is None
