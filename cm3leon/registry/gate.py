"""The gate: may the challenger become the champion? Pure comparison of two evaluation records; the registry does the rest."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from cm3leon.config.schema import GateConfig
from cm3leon.evaluation.record import Record
from cm3leon.sequence.tasks import TASKS

LOWER_IS_BETTER = ("fd_", "kd_")
"""Scores whose names start so are better when lower; all others are better when higher."""


@dataclass(frozen=True)
class Row:
    """One check of one score. ``limit`` is the worst value that passes; ``passed`` is None where nothing was demanded."""

    metric: str
    check: str
    challenger: float | None
    champion: float | None
    limit: float | None
    passed: bool | None
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What the gate decided: ``rows`` for the scores, ``notes`` for the rest, ``refusals`` for what holds the model back beside scores."""

    challenger: str
    champion: str | None
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the challenger may be promoted."""
        return not self.refusals and all(row.passed is not False for row in self.rows)

    def __str__(self) -> str:
        failed = [*self.refusals, *(f"{row.metric}: {row.reason}" for row in self.rows if row.passed is False)]
        demanded = sum(row.passed is not None for row in self.rows)
        against = f"version {self.champion}" if self.champion else "no champion yet"
        if failed:
            return f"held back ({against}): {'; '.join(failed)}"
        return f"passed {demanded} {'check' if demanded == 1 else 'checks'} ({'; '.join([against, *self.notes])})"

    def to_markdown(self) -> str:
        """The verdict as a table."""
        lines = [
            f"## Gate: version {self.challenger} {'passes' if self.passed else 'is held back'}",
            "",
            f"Champion: {f'version {self.champion}' if self.champion else 'none'}.",
            *(f"**{text}**" for text in self.refusals),
            *self.notes,
            "",
            "| score | challenger | champion | check | limit | verdict | reason |",
            "|---|---:|---:|---|---:|---|---|",
        ]
        for row in self.rows:
            verdict = {True: "pass", False: "**fail**", None: "-"}[row.passed]
            figures = [_show(value) for value in (row.challenger, row.champion)]
            lines.append(f"| {row.metric} | {' | '.join(figures)} | {row.check} | {_show(row.limit)} | {verdict} | {row.reason} |")
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """The verdict for programs."""
        return json.dumps({"passed": self.passed, **asdict(self)}, indent=2) + "\n"


def _show(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of the score is the better one."""
    return metric.startswith(LOWER_IS_BETTER)


def compare(
    config: GateConfig, challenger: tuple[str, Record], champion: tuple[str, Record] | None, refusals: list[str] | None = None
) -> Verdict:
    """Judge a challenger, given as (version, record), by floors, ceilings and, against a champion, margins.

    A score can be compared only if both were evaluated under the same contract, as far as it concerns that score
    (:func:`concerns`). To others margins cannot be applied: ``config.on_contract_change`` says whether floors and ceilings then decide
    alone or the challenger is held back.
    """
    version, record = challenger
    refusals, notes, rows = list(refusals or []), [], []
    base = champion[1].scores if champion else {}
    changed = contract_changes(record.contract, champion[1].contract) if champion and champion[0] != version else []
    if champion is None:
        notes.append("floors and ceilings decide")
    elif champion[0] == version:
        notes.append("the challenger is the champion")
    elif changed:
        concerned = {metric for metric in base if any(concerns(entry, metric) for entry in changed)}
        which = "scores" if concerned == set(base) else ", ".join(sorted(concerned)) or "no score"
        text = f"evaluated differently from the champion ({', '.join(changed)}), so {which} cannot be compared"
        if config.on_contract_change == "refuse":
            refusals.append(f"{text}, and gate.on_contract_change is refuse")
        else:
            notes.append(f"{text}: there floors and ceilings decide")
    for metric in sorted({*record.scores, *config.floors, *config.ceilings, *config.margins}):
        comparable = champion is not None and not any(concerns(entry, metric) for entry in changed)
        rows += _rows(config, metric, record.scores.get(metric), base.get(metric) if comparable else None, comparable)
    return Verdict(version, champion[0] if champion else None, rows, notes, refusals)


def _rows(config: GateConfig, metric: str, value: float | None, old: float | None, comparable: bool) -> list[Row]:
    """The checks of one score, or one row without a demand."""
    limits: list[tuple[str, float | None, bool, str]] = []
    if metric in config.floors:
        limits.append(("floor", config.floors[metric], False, "below the floor"))
    if metric in config.ceilings:
        limits.append(("ceiling", config.ceilings[metric], True, "above the ceiling"))
    if metric in config.margins and comparable:
        margin, lower = config.margins[metric], lower_is_better(metric)
        limit = None if old is None else old + margin if lower else old - margin
        limits.append((f"margin {margin:g}", limit, lower, f"worse than the champion by more than {margin:g}"))
    rows = []
    for check, limit, lower, complaint in limits:
        if value is None and old is None and check.startswith("margin"):
            rows.append(Row(metric, check, None, None, None, None, "neither record has such a score"))
        elif value is None:
            rows.append(Row(metric, check, None, old, limit, False, "the challenger's record has no such score"))
        elif limit is None:
            rows.append(Row(metric, check, value, None, None, None, "the champion's record has no such score"))
        else:
            passed = value <= limit + 1e-9 if lower else value >= limit - 1e-9
            rows.append(Row(metric, check, value, old, limit, passed, "" if passed else complaint))
    return rows or ([Row(metric, "none", value, old, None, None, "")] if value is not None else [])


def contract_changes(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """The contract's entries that differ. A task that both were asked counts by what was asked, as ``tasks/NAME``; one that only one of
    them was asked does not count."""
    new, old = dict(new), dict(old)
    ours, theirs = new.pop("tasks", {}), old.pop("tasks", {})
    tasks = [f"tasks/{name}" for name in ours.keys() & theirs.keys() if ours[name].get("asked") != theirs[name].get("asked")]
    return sorted([name for name in new | old if new.get(name) != old.get(name)] + tasks)


def concerns(entry: str, metric: str) -> bool:
    """Whether an entry of the contract concerns a score: that of a task its own scores, a feature extractor what is measured by it, all
    others every score."""
    if entry == "features":
        return metric in ("clip_score", "edit/image_similarity") or metric.endswith("_encoder")
    if entry == "inception":
        return metric.endswith("_inception")
    if entry.startswith("tasks/"):
        task = entry.removeprefix("tasks/")
        return metric.partition("/")[0] == (TASKS[task].score.partition("/")[0] if task in TASKS else task)
    return True
