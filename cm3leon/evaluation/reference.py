"""Fresh trainings whose scores and times are kept, so that a run can be compared with them: ``docs/results.json``.

One training says little, because runs that differ in their seed alone differ. ``python -m benchmarks.repeat`` adds trainings to the file.
Those count together that have the same parameters, apart from the seed, and were asked the same.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cm3leon.config.schema import Config
from cm3leon.evaluation.calibration import lower_is_better
from cm3leon.evaluation.record import TOLERANCE, Record, digest
from cm3leon.sequence.tasks import TASKS
from cm3leon.utils.errors import UserError

RESULTS = Path("docs/results.json")
UNRELATED = ("seed", "launch", "drift", "gate")
"""Entries of the parameters that are no part of their digest: what differs between the runs, and what changes no model and no score."""
TRAINED = ("features", "inception")
"""Entries of the contract that are no part of its digest: the networks that measure, of which one is trained in the run itself."""
MAIN = (*(task.score for task in TASKS.values()), "infill/composition")
"""The main score of each task, in the order of the tasks."""


@dataclass(frozen=True)
class FreshRun:
    """A training from nothing, and its evaluation.

    Attributes:
        seed: ``seed`` of the parameters.
        threads: threads of a process.
        processor: its name and its widest instructions.
        date: when it ended, UTC, ISO 8601.
        commit: of the code.
        profile: name of the profile.
        parameters: :func:`parameters_digest`.
        evaluation: :func:`evaluation_digest`.
        scores, calibration: as in the evaluation record.
        minutes: of the whole pipeline, registration included; None for a run that was interrupted.
        seconds: wall-clock time by stage; empty for a run that was interrupted.
        peak_megabytes: of the largest process of a stage; None for a run that was interrupted.
    """

    seed: int
    threads: int
    processor: str
    date: str
    commit: str
    profile: str
    parameters: str
    evaluation: str
    scores: dict[str, float]
    calibration: dict[str, float]
    minutes: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_megabytes: float | None = None

    @property
    def origin(self) -> tuple[int, str, int]:
        """What tells two runs of the same parameters apart: seed, processor and threads; the last two change rounding, and so the model."""
        return self.seed, self.processor, self.threads


@dataclass(frozen=True)
class Spread:
    """Median and range of a score over runs; ``worst`` is the highest value of a score that is better when lower (``lower``)."""

    median: float
    worst: float
    best: float
    count: int
    lower: bool

    def is_worse(self, value: float) -> bool:
        """Whether a value is outside of the range, on the side of the worst."""
        beyond = value - self.worst if self.lower else self.worst - value
        return beyond > TOLERANCE


@dataclass(frozen=True)
class Comparison:
    """A run beside the fresh runs of the same parameters.

    Attributes:
        count: number of fresh runs; 0 if none has these parameters.
        scores: name -> the run's score, and the spread of the fresh runs.
        seconds: stage -> median of its seconds in the fresh runs.
    """

    count: int = 0
    scores: dict[str, tuple[float, Spread]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def parameters_digest(config: Config) -> str:
    """Digest of the parameters on which models and scores depend, apart from the seed."""
    tree = config.model_dump(mode="json", by_alias=True)
    return digest({name: value for name, value in tree.items() if name not in UNRELATED})


def evaluation_digest(record: Record) -> str:
    """Digest of what was asked, and how: of the record's contract without the networks that measure."""
    return digest({name: value for name, value in record.contract.items() if name not in TRAINED})


def read_runs(path: Path = RESULTS) -> list[FreshRun]:
    """The runs of a file; none if there is no such file.

    Raises:
        UserError: if it does not hold runs, as after a merge with conflicts.
    """
    try:
        return [FreshRun(**run) for run in json.loads(path.read_text())["runs"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what python -m benchmarks.repeat writes ({error}); check out an earlier version of it") from None


def write_runs(path: Path, runs: Iterable[FreshRun]) -> None:
    """Write runs to a file, whole or not at all; a value has a line of its own, so that git shows what was added."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps({"runs": [asdict(run) for run in runs]}, indent=1) + "\n")
    part.replace(path)


def with_run(runs: Iterable[FreshRun], new: FreshRun) -> list[FreshRun]:
    """Runs and a new one. It replaces a run of the same origin, and all that have other parameters, which git keeps."""
    kept = (run for run in runs if run.parameters == new.parameters and run.origin != new.origin)
    return [*kept, new]


def comparable(runs: Sequence[FreshRun]) -> list[FreshRun]:
    """The runs that count together: those with the parameters and the evaluation of the newest, by origin."""
    if not runs:
        return []
    newest = max(runs, key=lambda run: run.date)
    kind = (newest.parameters, newest.evaluation)
    return sorted((run for run in runs if (run.parameters, run.evaluation) == kind), key=lambda run: run.origin)


def spread(name: str, values: Sequence[float]) -> Spread:
    """Median and range of the values of a score."""
    lower = lower_is_better(name)
    worst, best = (max(values), min(values)) if lower else (min(values), max(values))
    return Spread(statistics.median(values), worst, best, len(values), lower)


def spreads(values: Iterable[Mapping[str, float]]) -> dict[str, Spread]:
    """Median and range of each name of several mappings, over those that have it."""
    found: dict[str, list[float]] = {}
    for mapping in values:
        for name, value in mapping.items():
            found.setdefault(name, []).append(value)
    return {name: spread(name, each) for name, each in found.items()}


def main_scores(names: Iterable[str]) -> list[str]:
    """Of names of scores, the main ones of the tasks and their variants, such as that of seen prompts, without breakdowns."""
    ordered = sorted(names)
    return [name for main in MAIN for name in ordered if name == main or name.startswith(f"{main}_")]


def compare(config: Config, evaluation: Path | None, path: Path = RESULTS) -> Comparison:
    """A run beside the fresh runs of a file, if they have its parameters; scores only if they were asked the same.

    Args:
        evaluation: directory of the run's evaluation record; None if it was not evaluated.

    Raises:
        UserError: as :func:`read_runs`.
    """
    runs = comparable(read_runs(path))
    if not runs or runs[0].parameters != parameters_digest(config):
        return Comparison()
    seconds = {stage: found.median for stage, found in spreads(run.seconds for run in runs).items()}
    record = _read(evaluation) if evaluation else None
    if record is None or evaluation_digest(record) != runs[0].evaluation:
        return Comparison(len(runs), {}, seconds)
    known = spreads(run.scores for run in runs)
    scores = {name: (record.scores[name], known[name]) for name in main_scores(record.scores) if name in known}
    return Comparison(len(runs), scores, seconds)


def _read(evaluation: Path) -> Record | None:
    try:
        return Record.read(evaluation)
    except (OSError, ValueError, KeyError, TypeError):
        return None
