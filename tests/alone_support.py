"""Code that runs with a few packages only, as on the machine of somebody who has no more."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement


def required(names: Sequence[str]) -> set[str]:
    """Distributions and all that they require, without extras."""
    found: set[str] = set()
    left = list(names)
    while left:
        if (name := left.pop()) in found:
            continue
        found.add(name)
        wanted = [Requirement(text) for text in metadata.requires(name) or []]
        left += [need.name for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def run_alone(code: str, packages: Sequence[str], directory: Path) -> None:
    """Run code in a directory, with no other packages than these and what they require."""
    with TemporaryDirectory() as folder:
        place = Path(folder)
        for name in required(packages):
            package = metadata.distribution(name)
            for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
                if not (place / top).exists():
                    (place / top).symlink_to(Path(str(package.locate_file(top))))
        arguments = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({folder!r})\n{code}"]
        home = f"{folder}/home"
        environment = {"HOME": home, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(arguments, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
