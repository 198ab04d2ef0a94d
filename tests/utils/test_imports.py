"""The modules that a module imports, read from made-up source; and packages that are not to be imported."""

import subprocess
import sys

from cm3leon.utils.imports import import_closure, imported_files

SOURCES = {
    "pack/__init__.py": "",
    "pack/a.py": "import pack.b\nimport json\n",
    "pack/b.py": "def later():\n    from pack.room import c\n",
    "pack/room/__init__.py": "",
    "pack/room/c.py": "from pack.d import value\nfrom pack import a\n",
    "pack/d.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pack import e\nvalue = 1\n",
    "pack/e.py": "",
}


def make(folder):
    for name, text in SOURCES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def names(files, folder):
    return [file.relative_to(folder).as_posix() for file in files if file.name != "__init__.py"]


def test_imports_at_the_top_and_inside_functions_are_followed_also_in_circles(tmp_path):
    make(tmp_path)
    closure = import_closure([tmp_path / "pack/a.py"], tmp_path, lambda file: True)
    assert names(closure, tmp_path) == ["pack/a.py", "pack/b.py", "pack/d.py", "pack/room/c.py"]
    assert names(imported_files(tmp_path / "pack/b.py", tmp_path), tmp_path) == ["pack/room/c.py"]


def test_what_is_not_to_be_followed_is_left_out_with_its_imports(tmp_path):
    make(tmp_path)
    closure = import_closure([tmp_path / "pack/a.py"], tmp_path, lambda file: file.name != "c.py")
    assert names(closure, tmp_path) == ["pack/a.py", "pack/b.py"]


def test_a_hidden_package_cannot_be_imported_meanwhile() -> None:
    program = """
from cm3leon.utils.imports import hidden
with hidden("colorsys"):
    try:
        import colorsys
    except ImportError:
        print("hidden")
import colorsys
with hidden("colorsys"):
    import colorsys
    print("known")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["hidden", "known"]


def test_a_trained_encoder_imports_no_towers_of_other_packages() -> None:
    program = """
import sys
from cm3leon.config.schema import EncoderConfig
from cm3leon.models.clip import build_clip, trained_settings
build_clip(trained_settings(EncoderConfig(), 300)["model"])
print(bool({"transformers", "timm"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
