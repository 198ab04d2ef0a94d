"""What ingest and validate make of files that are damaged, rare or made to cost much: python -m benchmarks.hostile [--runs 3] [--flips 40]

The files are those of ``tests/images_support.py``: every format that is read, cut at each tenth and with flipped bits; every mode in every
format that Pillow writes; PNGs of all color types and bit depths with each chunk damaged; bombs, animations, odd EXIF and color profiles.
Each run is a program of its own that packs them from the source ``sidecar`` and validates them, with Data Docs and data report. Every row
must be accounted for, in 20 ms a file on average and 600 MB for the processes together (proportional set size). Medians, with ranges in
parentheses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.images_support import hostile_files

MILLISECONDS, MEGABYTES = 20.0, 600.0
"""The bars: of a file, and of all processes together at any time."""
POLL_SECONDS = 0.05
PROGRAM = """
import json, time
from pathlib import Path
from cm3leon.config.ingest_schema import SidecarConfig
from cm3leon.config.schema import ValidateConfig
from cm3leon.data.packing import pack
from cm3leon.data.sources import sidecar
from cm3leon.stages.validate import validate
start = time.perf_counter()
pack(sidecar.rows(SidecarConfig(license="MIT"), Path("files")), Path("raw"), 32)
packed = time.perf_counter()
report = validate(Path("raw"), Path("validated"), Path("docs"), ValidateConfig(max_rejected_rate=1.0), 0)
seconds = {"ingest": packed - start, "validate": time.perf_counter() - packed}
print(json.dumps({"seconds": seconds, "report": report}))
"""


def write_files(root: Path, flips: int) -> int:
    """Write the files, each with a caption beside it; returns their number."""
    root.mkdir()
    number = -1
    for number, content in enumerate(hostile_files(flips)):
        (root / f"{number:05d}.png").write_bytes(content)
        (root / f"{number:05d}.txt").write_text(f"picture {number}")
    return number + 1


def memory_of_tree(pid: int) -> float:
    """Memory of a process and its descendants, MB: pages that several share count once."""
    total = 0
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for process in tree:
        try:
            found = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        total += getattr(found, "pss", found.uss)  # Linux alone tells the first
    return total / 1e6


@dataclass(frozen=True)
class Run:
    """What came out of a run.

    Attributes:
        report: the content of ``report.json``.
        seconds: of each stage.
        megabytes: the most memory of the processes together.
    """

    report: dict[str, Any]
    seconds: dict[str, float]
    megabytes: float

    @property
    def milliseconds(self) -> float:
        """Of a file."""
        return 1000 * sum(self.seconds.values()) / int(self.report["read"])


def run(directory: Path) -> Run:
    """Run in a directory that has ``files``."""
    output, peak = directory / "output.json", 0.0
    with output.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=directory, stdout=file, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, memory_of_tree(process.pid))
            time.sleep(POLL_SECONDS)
    if process.returncode != 0:
        sys.exit(f"error: a run ended with status {process.returncode}")
    found = json.loads(output.read_text().splitlines()[-1])
    return Run(found["report"], found["seconds"], peak)


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """The median, with the range in parentheses."""
    return f"{form(statistics.median(values))} ({form(min(values))} to {form(max(values))})"


def main() -> None:
    """Write the files, run several times, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--flips", type=int, default=40, help="files with flipped bits of each format")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cm3leon-hostile-") as folder:
        written = write_files(Path(folder) / "files", options.flips)
        found = [run(Path(folder)) for _ in range(options.runs)]
    report = found[0].report
    print(f"{written:,} files: {report['read']:,} rows read, {report['accepted']:,} accepted, {report['rejected']:,} rejected")
    for reason, count in sorted(report["reasons"].items(), key=lambda item: -item[1]):
        print(f"  {reason:<20} {count:,}")
    times, peaks = [one.milliseconds for one in found], [one.megabytes for one in found]
    print(f"milliseconds a file  {spread(times, '{:.1f}'.format)}, at most {MILLISECONDS:g}")
    print(f"memory, MB           {spread(peaks, '{:.0f}'.format)}, at most {MEGABYTES:g}")
    for one in found:
        if not written == one.report["read"] == one.report["accepted"] + one.report["rejected"]:
            sys.exit("error: rows are not accounted for")
    if statistics.median(times) > MILLISECONDS or statistics.median(peaks) > MEGABYTES:
        sys.exit("error: a bar is missed")


if __name__ == "__main__":
    main()
