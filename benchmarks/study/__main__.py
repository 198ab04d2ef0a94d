"""The paper's claims measured again on the project's own data: python -m benchmarks.study

Uses the tokenizers, encoder, memory bank and tuned model of the last pipeline run, trains small decoders in ``models/study/``, and writes
``docs/study.md`` with its plots. All scores are of the val split. Trained decoders and results are kept, so an interrupted study resumes
when it is started again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.study import claims
from benchmarks.study.report import write
from benchmarks.study.runs import ROOT, Study
from cm3leon.config.loading import load_config

CLAIMS = {
    "retrieval": claims.retrieval,
    "guidance": claims.guidance,
    "candidates": claims.candidates,
    "masking": claims.masking,
    "tuning": claims.tuning,
    "sizes": claims.sizes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=2e6, help="training tokens of each decoder")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=CLAIMS, nargs="*", default=list(CLAIMS))
    parser.add_argument("--out", type=Path, help="directory of the page; by default docs, and models/study if --only leaves sections out")
    options = parser.parse_args()
    study = Study(load_config(), int(options.tokens), options.prompts, options.seeds)
    start = time.perf_counter()
    sections = {}
    for name in options.only:
        sections[name] = CLAIMS[name](study)
        print(f"{name}: done after {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    write(study, sections, options.out or (Path("docs") if len(sections) == len(CLAIMS) else ROOT))


if __name__ == "__main__":
    main()
