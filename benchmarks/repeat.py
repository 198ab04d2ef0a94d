"""Fresh trainings of profile small, whose median and range every headline is: python -m benchmarks.repeat --seeds 0 1 2 3 4 [--threads N]

Each seed that ``docs/results.json`` lacks under the present parameters and with so many threads is trained in a clone of HEAD, by the
pipeline as ``make run`` runs it, about half an hour on two cores. It is added to the file as soon as it has ended, and ``docs/results.md``
is written from the file; so they are without any seeds. The same command goes on where it was interrupted, in the same clone and at its
commit; such a run counts for the scores, and not for the times. So does one with ``--beside``, on a machine that does other work meanwhile.
Runs of other parameters leave the file when the first of new ones is added; git keeps them.

``--add DIR`` adds the run of a checkout in which the pipeline has ended, on this machine, and trains nothing.

Two runs at least are to be on another kind of processor, or with other threads.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.reproduce import ROOT, clone, environment_of
from cm3leon.config import paths
from cm3leon.config.loading import load_config
from cm3leon.config.profiles import load_profile
from cm3leon.evaluation.record import FILE as RECORD
from cm3leon.evaluation.record import Record
from cm3leon.evaluation.reference import (
    RESULTS,
    FreshRun,
    comparable,
    evaluation_digest,
    parameters_digest,
    read_runs,
    with_run,
    write_runs,
)
from cm3leon.evaluation.results_page import page
from cm3leon.stages.common import STAGES
from cm3leon.tracking.durations import stage_seconds
from cm3leon.tracking.lineage import changed_files, git_commit
from cm3leon.tracking.sqlite import sqlite_uri
from cm3leon.tracking.store import EXPERIMENT
from cm3leon.utils.errors import UserError
from cm3leon.utils.processes import stop_tree

PROFILE = "small"
PIPELINE = ["-m", "flows.pipeline"]
PEAK = "_peak_megabytes"
WRITTEN = {"params.yaml", str(RESULTS), str(RESULTS.with_suffix(".md"))}
"""Files that may differ from the commit: the parameters, which have a digest, and what is written here."""
OWN_DIGEST = (
    "from cm3leon.config.loading import load_config; from cm3leon.evaluation.reference import parameters_digest; "
    "print(parameters_digest(load_config()))"
)
"""Run in a project, whose package is then imported: ``python -c`` looks in the working directory first."""
INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
"""Flag of a processor -> its name, the widest instructions first: two processors of one name may differ in them."""


def repeat(seeds: Sequence[int], threads: int, results: Path, parameters: str, train: Callable[[int], FreshRun]) -> None:
    """Train the seeds that a file of runs lacks, add each to it as soon as it has ended, and write its page.

    Args:
        threads: of a process; a seed that was trained with another number of them is trained again, and counts beside that run.
        results: the file; the page is beside it, with the ending ``.md``.
        parameters: digest of the parameters under which runs count.
        train: makes the run of a seed.
    """
    write_page(results)
    for seed in seeds:
        if any((run.seed, run.threads, run.parameters) == (seed, threads, parameters) for run in comparable(read_runs(results))):
            print(f"seed {seed}: in {results.name}", flush=True)
            continue
        keep(train(seed), results)


def keep(found: FreshRun, results: Path) -> None:
    """Add a run to a file of runs, and write its page."""
    runs = read_runs(results)
    kept = with_run(runs, found)
    write_runs(results, kept)
    write_page(results)
    left = len(runs) + 1 - len(kept)
    print(f"seed {found.seed}: added to {results.name}{f'; {left} earlier runs left it' if left else ''}", flush=True)


def write_page(results: Path) -> None:
    """Write the page of a file of runs."""
    results.with_suffix(".md").write_text(page(read_runs(results)))


def train_in_clone(seed: int, threads: int, directory: Path, parameters: str, beside: bool) -> FreshRun:
    """Train a seed in a clone, which is kept; one that is there goes on.

    Args:
        beside: the machine does other work meanwhile: the times do not count.

    Raises:
        subprocess.CalledProcessError: if the pipeline fails.
        UserError: as :func:`check_parameters`.
    """
    # 1. The clone. One of another state of the parameters, or for other threads, has another name.
    project = directory / f"{PROFILE}-{parameters[:8]}-seed-{seed}-threads-{threads}"
    begun = project.with_name(f"{project.name}.begun")
    resumed = project.exists() and begun.exists()
    if resumed:
        print(f"seed {seed}: goes on in {project} at commit {commit_of(project)[:7]}; its times will not count", flush=True)
    else:
        shutil.rmtree(project, ignore_errors=True)  # a half of a clone, if that was interrupted
        directory.mkdir(parents=True, exist_ok=True)
        clone(project, "HEAD", PROFILE, f"seed={seed}")
        check_parameters(project, parameters)
        begun.touch()

    # 2. The pipeline.
    environment = environment_of(project) | {"OMP_NUM_THREADS": str(threads)}
    start = time.monotonic()
    with subprocess.Popen([sys.executable, *PIPELINE], cwd=project, env=environment) as process:
        try:
            status = process.wait()
        except BaseException:
            stop_tree(process.pid)  # the stage that it runs too
            raise
    minutes = (time.monotonic() - start) / 60
    if status != 0:
        raise subprocess.CalledProcessError(status, process.args)

    # 3. What it has left.
    found = collect(project, threads, None if resumed or beside else minutes)
    begun.unlink()  # trained again, it starts in a clone of its own
    return found


def finished(project: Path, threads: int, parameters: str) -> FreshRun:
    """The run of a checkout in which the pipeline has ended; with times if its last run that ran stages ran them all.

    Raises:
        UserError: if it is not evaluated or its code is not that of the run, or as :func:`check_parameters`.
    """
    if not (project / paths.EVALUATION / RECORD).is_file():
        raise UserError(f"{project} has no {paths.EVALUATION / RECORD}; add a checkout in which the pipeline has ended")
    check_parameters(project, parameters)
    run = working_run(project)
    changed = sorted(set(changed_files(project)) - WRITTEN)
    if changed or commit_of(project) != commit_tag(run):
        raise UserError(
            f"{project} has other code than its run at commit {commit_tag(run)[:7]}: it is at {commit_of(project)[:7]}, "
            f"with changes of {', '.join(changed) or 'nothing'}; nothing tells what was trained"
        )
    whole = set(STAGES) <= stage_seconds(run.data.metrics).keys()
    return collect(project, threads, (run.info.end_time - run.info.start_time) / 60_000 if whole else None)


def check_parameters(project: Path, parameters: str) -> None:
    """Raises :class:`UserError` if the digest of a project's parameters is another, by the code of that project.

    This checkout's code may have parameters that the project's has not: changes without a commit, or a HEAD that has moved meanwhile. The
    defaults of these would be taken for what the project was trained with.
    """
    command = [sys.executable, "-c", OWN_DIGEST]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{project} does not tell its parameters: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    if (own := done.stdout.strip()) != parameters:
        raise UserError(
            f"the parameters of {project} ({own[:8]}) are not those of profile {PROFILE} in this checkout ({parameters[:8]}): "
            "commit changes of parameters first, and start again if HEAD has moved"
        )


def collect(project: Path, threads: int, minutes: float | None) -> FreshRun:
    """The run of a project whose pipeline has ended, from its parameters, its evaluation record and its tracking store.

    Args:
        minutes: of the pipeline; None if nothing tells how long it and its stages take: it was interrupted, or other work ran beside it.
    """
    config = load_config(project / "params.yaml")
    record = Record.read(project / paths.EVALUATION)
    run = working_run(project)
    metrics = {} if minutes is None else run.data.metrics
    seconds = stage_seconds(metrics)
    return FreshRun(
        seed=config.seed,
        threads=threads,
        processor=processor(Path("/proc/cpuinfo")),
        date=datetime.fromtimestamp(run.info.end_time / 1000, UTC).isoformat(timespec="seconds"),
        commit=commit_tag(run),
        profile=config.profile,
        parameters=parameters_digest(config),
        evaluation=evaluation_digest(record),
        scores=record.scores,
        calibration=record.calibration,
        minutes=None if minutes is None else round(minutes, 2),
        seconds={stage: round(seconds[stage], 1) for stage in STAGES if stage in seconds},
        peak_megabytes=max((value for name, value in metrics.items() if name.endswith(PEAK)), default=None),
    )


def working_run(project: Path) -> Any:
    """The last pipeline run in a project's own store that ran a stage, as MLflow has it; the last of all if one was killed that did.

    Raises:
        UserError: if there is none that has ended.
    """
    from mlflow import MlflowClient

    client = MlflowClient(sqlite_uri(project / "mlflow.db"))
    experiment: Any = client.get_experiment_by_name(EXPERIMENT)
    order = ["attributes.start_time DESC"]
    runs = client.search_runs([experiment.experiment_id], "tags.stage = 'pipeline'", order_by=order) if experiment else []
    ended = [run for run in runs if run.info.end_time]
    if not ended:
        raise UserError(f"{project / 'mlflow.db'} has no run of the pipeline that has ended")
    return next((run for run in ended if stage_seconds(run.data.metrics)), ended[0])


def commit_tag(run: Any) -> str:
    """The commit at which a pipeline's run began, as :func:`commit_of`."""
    return str(run.data.tags.get("git_commit", "unknown")).removesuffix("-dirty")


def commit_of(project: Path) -> str:
    """The commit of a project, whose ``params.yaml`` may differ from it."""
    return (git_commit(project) or "unknown").removesuffix("-dirty")


def processor(cpuinfo: Path) -> str:
    """Name and widest instructions of the processor: "AMD EPYC, AVX512-BF16"; "unknown" where there is no such file."""
    if not cpuinfo.is_file():
        return "unknown"
    found = dict(line.split(":", 1) for line in reversed(cpuinfo.read_text().splitlines()) if ":" in line)
    known = {name.strip(): value.strip() for name, value in found.items()}
    flags = known.get("flags", "").split()
    widest = next((name for flag, name in INSTRUCTIONS.items() if flag in flags), "")
    return ", ".join(filter(None, [known.get("model name", "unknown"), widest]))


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="seeds to train; without any, only the page is written")
    parser.add_argument("--threads", type=int, help=f"threads of a process (default: {torch.get_num_threads()}; --add needs them stated)")
    parser.add_argument("--beside", action="store_true", help="the machine does other work meanwhile: times do not count")
    parser.add_argument("--directory", type=Path, default=ROOT / ".cache" / "repeat", help="where the clones are")
    parser.add_argument("--add", type=Path, metavar="DIR", help="add the run of a checkout in which the pipeline has ended on this machine")
    options = parser.parse_args()
    if options.add and not options.threads:
        parser.error("--add needs --threads: a run does not state how many it had")
    threads = options.threads or torch.get_num_threads()
    parameters = parameters_digest(load_profile(PROFILE, configs=ROOT / "configs"))
    directory = options.directory.absolute()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        if options.add:
            keep(finished(options.add.absolute(), threads, parameters), ROOT / RESULTS)
        repeat(
            options.seeds,
            threads,
            ROOT / RESULTS,
            parameters,
            lambda seed: train_in_clone(seed, threads, directory, parameters, options.beside),
        )
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error}; the same command goes on in the same clone")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
