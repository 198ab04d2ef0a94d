"""The paper's claims measured again on the project's own data: python -m benchmarks.study [--runs DIR ...]

Uses the tokenizers, encoder, memory bank and tuned model of the last pipeline run, trains small decoders in ``models/study/``, and writes
``docs/study.md`` with its plots. All scores are of the val split. Trained decoders and results are kept, so an interrupted study resumes
when it is started again. Two sections, the tuned decoders' own, are of the runs in ``--runs`` instead, such as those of
``benchmarks.repeat``: with one run they state no intervals.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.study.claims import CLAIMS, measured
from benchmarks.study.report import write
from benchmarks.study.runs import ROOT, Study
from cm3leon.config import paths
from cm3leon.config.loading import load_config
from cm3leon.evaluation.reference import parameters_digest
from cm3leon.tracking.lineage import content_hash

LONGEST_FIRST = ("masking", "retrieval", "sizes", "candidates", "guidance", "tuning")
"""The order in which sections are begun, so that processes end at about the same time."""


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=2e6, help="training tokens of each decoder")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=CLAIMS, nargs="*", default=list(CLAIMS))
    parser.add_argument("--out", type=Path, help="directory of the page; by default docs, and models/study if --only leaves sections out")
    parser.add_argument("--runs", type=Path, nargs="+", default=[Path()], help="directories of finished pipeline runs of other seeds")
    parser.add_argument("--processes", type=int, default=2, help="sections measured at the same time")
    options = parser.parse_args()
    for run in options.runs:
        if not (run / paths.FINETUNED).is_dir():
            parser.error(f"{run} has no {paths.FINETUNED}; --runs takes directories in which the pipeline has ended")
    if len({content_hash(run / paths.FINETUNED) for run in options.runs}) < len(options.runs):
        parser.error("two of --runs have the same tuned decoder; name trainings of other seeds")
    if len({parameters_digest(load_config(run / paths.PARAMS)) for run in options.runs}) > 1:
        parser.error("--runs have other parameters than one another, so that they are no repetitions")
    study = Study(load_config(), int(options.tokens), options.prompts, options.seeds, tuple(run.resolve() for run in options.runs))
    if not study.captions:
        parser.error("no caption of the val split describes a scene; the study is of the source shapes")
    start = time.perf_counter()
    threads = max(1, torch.get_num_threads() // options.processes)
    with ProcessPoolExecutor(options.processes, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        begun = {name: pool.submit(measured, name, study) for name in LONGEST_FIRST if name in options.only}
        sections = {name: begun[name].result() for name in CLAIMS if name in begun}
    print(f"all done after {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    write(study, sections, options.out or (Path("docs") if len(sections) == len(CLAIMS) else ROOT))


if __name__ == "__main__":
    main()
