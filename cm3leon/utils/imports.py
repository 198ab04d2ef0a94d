"""Imports: which modules a module needs, read from the source text, and packages that are not to be imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def imported_files(file: Path, root: Path) -> Iterator[Path]:
    """Files below ``root`` that ``file`` imports, at its top or inside functions; not those that it only names in annotations.

    Args:
        root: the folder that holds the packages; imports from elsewhere are left out.
    """
    for node in _executed(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # ``from package import name``: the name can be a module or something that the package defines.
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            path = root.joinpath(*name.split("."))
            candidates = (path.with_suffix(".py"), path / "__init__.py")
            yield from (candidate for candidate in candidates if candidate.is_file())


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all nodes below it, without those under ``if TYPE_CHECKING``."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from _executed(child)


def import_closure(starts: Iterable[Path], root: Path, follow: Callable[[Path], bool]) -> list[Path]:
    """``starts`` and every file that they import, directly or through others, sorted.

    Args:
        follow: files for which it is false are left out, and their imports are not followed.
    """
    seen: set[Path] = set()
    todo = [file for file in starts if follow(file)]
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo += [found for found in imported_files(file, root) if follow(found)]
    return sorted(seen)


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Make packages look as if they were not installed, while others are imported that use them only where they are.

    Packages that have been imported already stay as they are.
    """
    absent = [package for package in packages if package not in sys.modules]
    for package in absent:
        sys.modules[package] = None  # type: ignore[assignment]  # import statements then raise ImportError
    try:
        yield
    finally:
        for package in absent:
            del sys.modules[package]
