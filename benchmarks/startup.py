"""How long the commands of a registered model take to start: python benchmarks/startup.py

Each run is a new process in the project's directory, whose registry has a champion. The files have been read before, as after a first use.
Wall-clock and processor time include everything from the interpreter's start to its end; ``text-to-image`` generates one image.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

COMMAND = Path(sys.executable).with_name("cm3leon")
COMMANDS = {
    "--help": ["--help"],
    "status": ["status"],
    "caption": ["caption", "{image}"],
    "text-to-image": ["text-to-image", "a red circle above a blue square", "--out", "{image}"],
}
"""Name -> arguments; ``{image}`` is a file that a first, unmeasured run has generated."""


def start(arguments: Sequence[str]) -> tuple[float, float]:
    """Wall-clock and processor seconds of a run of the command.

    Raises:
        SystemExit: with the command's own error if it fails.
    """
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, check=False)
    wall, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a Markdown table: median and range of the seconds of each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="runs of each command")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        image = str(Path(folder) / "image.png")
        commands = {name: [part.format(image=image) for part in parts] for name, parts in COMMANDS.items()}
        start(commands["text-to-image"])
        print("| command | seconds, median | range | processor seconds, median | range |\n|---|---|---|---|---|")
        for name, arguments in commands.items():
            columns = []
            for seconds in zip(*(start(arguments) for _ in range(options.runs)), strict=True):
                columns += [f"{statistics.median(seconds):.2f}", f"{min(seconds):.2f} to {max(seconds):.2f}"]
            print(f"| `cm3leon {name}` | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
