"""The gate: a pure comparison of two evaluation records, which decides whether the challenger may become the champion."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from cm3leon.config.schema import GateConfig
from cm3leon.evaluation.record import Record
from cm3leon.sequence.tasks import TASKS

LOWER_IS_BETTER = ("fd_", "kd_")
"""Prefixes of the scores that are better when lower (distances); all others are better when higher."""

ROUNDING = 1e-9
"""By which a score may miss its limit: base and margin are decimal fractions, which floats only approximate."""


@dataclass(frozen=True)
class Row:
    """One check of one score.

    Attributes:
        metric: the score's name.
        check: floor, ceiling, margin, or none.
        challenger: the challenger's score; None if its record has no such score.
        champion: as ``challenger``; None also where the scores are not comparable.
        limit: the worst score that passes.
        passed: None if nothing was required.
        reason: why it failed, or why nothing was required.
    """

    metric: str
    check: str
    challenger: float | None
    champion: float | None
    limit: float | None
    passed: bool | None
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The decision.

    Attributes:
        challenger: its version.
        champion: its version; None if there is no champion.
        rows: the checks of the scores.
        notes: what a reader of the rows must know.
        refusals: reasons other than scores for which the challenger is held back.
    """

    challenger: str
    champion: str | None
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True if the challenger may be promoted."""
        return not self.refusals and all(row.passed is not False for row in self.rows)

    def __str__(self) -> str:
        failed = [*self.refusals, *(f"{row.metric}: {row.reason}" for row in self.rows if row.passed is False)]
        checked = sum(row.passed is not None for row in self.rows)
        against = f"version {self.champion}" if self.champion else "no champion yet"
        if failed:
            return f"held back ({against}): {'; '.join(failed)}"
        return f"passed {checked} {'check' if checked == 1 else 'checks'} ({'; '.join([against, *self.notes])})"

    def to_markdown(self) -> str:
        """The verdict as a markdown table."""
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
            scores = f"{_show(row.challenger)} | {_show(row.champion)}"
            lines.append(f"| {row.metric} | {scores} | {row.check} | {_show(row.limit)} | {verdict} | {row.reason} |")
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """The verdict as JSON: ``passed``, and the fields of this class."""
        return json.dumps({"passed": self.passed, **asdict(self)}, indent=2) + "\n"


def _show(score: float | None) -> str:
    return "" if score is None else f"{score:.4g}"


def lower_is_better(metric: str) -> bool:
    """True if a lower score is better."""
    return metric.startswith(LOWER_IS_BETTER)


def compare(
    config: GateConfig, challenger: tuple[str, Record], champion: tuple[str, Record] | None, refusals: list[str] | None = None
) -> Verdict:
    """Check a challenger, given as (version, record), by floors, ceilings and, against a champion, margins.

    A margin applies to a score only if both records have the same contract, as far as it concerns that score (:func:`concerns`).
    ``config.on_contract_change`` says whether floors and ceilings alone decide on the other scores, or the challenger is held back.

    Args:
        refusals: reasons of the caller for holding the challenger back.
    """
    version, record = challenger
    refusals = list(refusals or [])
    notes: list[str] = []
    rows: list[Row] = []

    # 1. Which entries of the contract differ, and what that means for the comparison.
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

    # 2. The checks of each score that a record has or the configuration names.
    for metric in sorted({*record.scores, *config.floors, *config.ceilings, *config.margins}):
        comparable = champion is not None and not any(concerns(entry, metric) for entry in changed)
        rows += _rows(config, metric, record.scores.get(metric), base.get(metric) if comparable else None, comparable)
    return Verdict(version, champion[0] if champion else None, rows, notes, refusals)


def _rows(config: GateConfig, metric: str, score: float | None, base: float | None, comparable: bool) -> list[Row]:
    """The checks of one score, or one row without a check.

    Args:
        score: the challenger's; None if its record has no such score.
        base: the champion's; None if its record has no such score, or the scores are not comparable.
        comparable: whether a margin applies.
    """
    # 1. The limits: check, limit, whether the limit is an upper one, reason of a failure.
    limits: list[tuple[str, float | None, bool, str]] = []
    if metric in config.floors:
        limits.append(("floor", config.floors[metric], False, "below the floor"))
    if metric in config.ceilings:
        limits.append(("ceiling", config.ceilings[metric], True, "above the ceiling"))
    if metric in config.margins and comparable:
        margin = config.margins[metric]
        upper = lower_is_better(metric)
        limit = None
        if base is not None:
            limit = base + margin if upper else base - margin
        limits.append((f"margin {margin:g}", limit, upper, f"worse than the champion by more than {margin:g}"))

    # 2. The checks. A score that the challenger has lost fails; one that it has gained has nothing to be compared with.
    rows = []
    for check, limit, upper, failure in limits:
        if score is None and base is None and check.startswith("margin"):
            rows.append(Row(metric, check, None, None, None, None, "neither record has such a score"))
        elif score is None:
            rows.append(Row(metric, check, None, base, limit, False, "the challenger's record has no such score"))
        elif limit is None:
            rows.append(Row(metric, check, score, None, None, None, "the champion's record has no such score"))
        else:
            passed = score <= limit + ROUNDING if upper else score >= limit - ROUNDING
            rows.append(Row(metric, check, score, base, limit, passed, "" if passed else failure))
    return rows or ([Row(metric, "none", score, base, None, None, "")] if score is not None else [])


def contract_changes(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """Names of the contract's entries that differ.

    A task that both models were asked is named ``tasks/NAME`` if other things were asked of it. One that only one model was asked does not
    count: a task learned or lost is no change of the evaluation.
    """
    new, old = dict(new), dict(old)
    new_tasks, old_tasks = new.pop("tasks", {}), old.pop("tasks", {})
    common = new_tasks.keys() & old_tasks.keys()
    tasks = [f"tasks/{name}" for name in common if new_tasks[name].get("asked") != old_tasks[name].get("asked")]
    return sorted([name for name in new | old if new.get(name) != old.get(name)] + tasks)


def concerns(entry: str, metric: str) -> bool:
    """True if an entry of the contract concerns a score.

    A task's entry concerns its own scores, a feature extractor's the scores that are measured with it, any other entry all scores.
    """
    if entry == "features":
        return metric in ("clip_score", "edit/image_similarity") or metric.endswith("_encoder")
    if entry == "inception":
        return metric.endswith("_inception")
    if entry.startswith("tasks/"):
        task = entry.removeprefix("tasks/")
        return metric.partition("/")[0] == (TASKS[task].score.partition("/")[0] if task in TASKS else task)
    return True
