"""The gate: a pure comparison of two evaluation records, which decides whether the challenger may become the champion.

Scores that are means are compared by pairs: both models were asked the same, and the difference of their outcomes varies much less than
the outcomes do. The bootstrap distribution of the mean difference (Efron 1979) gives its interval, and the risk: the probability that the
challenger is worse by more than the margin. A score that is no mean of outcomes, such as a distance, is compared by its value, and its risk
is 0 or 1.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cm3leon.config.schema import GateConfig
from cm3leon.evaluation.calibration import lower_is_better
from cm3leon.evaluation.record import Record, paired_differences, record_of
from cm3leon.sequence.tasks import TASKS

ROUNDING = 1e-9
"""By which a score may miss its limit: base and margin are decimal fractions, which floats only approximate."""
RESAMPLES, SEED = 4000, 0
"""Bootstrap resamples of paired differences: a risk of 0.5 has a standard error of 0.008."""


class Difference(NamedTuple):
    """Challenger minus champion, of one score.

    Attributes:
        mean: over the pairs, or the difference of two scores that are no means.
        resampled: its bootstrap distribution; None for a score that is no mean.
        pairs: number of paired outcomes; 0 without.
    """

    mean: float
    resampled: np.ndarray | None
    pairs: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval."""
        if self.resampled is None:
            return None
        low, high = np.quantile(self.resampled, [0.025, 0.975])
        return float(low), float(high)

    def risk(self, margin: float, lower: bool) -> float:
        """Probability that the challenger is worse by more than ``margin``; ``lower``: a lower score is better."""
        differences = np.array([self.mean]) if self.resampled is None else self.resampled
        return float(((differences if lower else -differences) > margin + ROUNDING).mean())


@dataclass(frozen=True)
class Row:
    """One check of one score.

    Attributes:
        metric: the score's name.
        check: ``floor``, ``ceiling`` or ``margin`` with its value, or none.
        challenger: the challenger's score; None if its record has no such score.
        champion: as ``challenger``.
        comparable: False if the champion's score was measured otherwise, so that it is shown but not compared.
        passed: None if nothing was required.
        reason: why it failed, or why nothing was required.
        difference: challenger minus champion, over the pairs; None if they were not compared.
        interval: 95 % interval of the difference; None for a score that is no mean.
        pairs: number of paired outcomes.
        risk: probability of being worse by more than the margin; None without a margin.
    """

    metric: str
    check: str
    challenger: float | None
    champion: float | None
    comparable: bool
    passed: bool | None
    reason: str
    difference: float | None = None
    interval: tuple[float, float] | None = None
    pairs: int = 0
    risk: float | None = None


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
        against = f"compared with version {self.champion}" if self.champion else "no champion yet"
        if failed:
            return f"held back ({against}): {'; '.join(failed)}"
        return f"passed {checked} {'check' if checked == 1 else 'checks'} ({'; '.join([against, *self.notes])})"

    @property
    def compared(self) -> bool:
        """True if a score was compared with the champion's."""
        return any(row.check.startswith("margin") and row.passed is not None for row in self.rows)

    def to_markdown(self) -> str:
        """The verdict as a markdown table: failed checks first, scores without a check last."""
        lines = [
            f"## Gate: version {self.challenger} {'passes' if self.passed else 'is held back'}",
            "",
            f"Champion: {f'version {self.champion}' if self.champion else 'none'}.",
            "",
            *(f"- **{text}**" for text in self.refusals),
            *(f"- {text}" for text in self.notes),
            "",
            "| score | challenger | champion | difference (95 %) | check | verdict | reason |",
            "|---|---:|---:|---:|---|---|---|",
        ]
        for row in sorted(self.rows, key=lambda row: (row.passed is None, row.passed is True)):
            verdict = {True: "pass", False: "**fail**", None: "-"}[row.passed]
            champion = _show(row.champion) if row.comparable or row.champion is None else f"({_show(row.champion)})"
            cells = [row.metric, _show(row.challenger), champion, _show_difference(row), row.check, verdict, row.reason]
            lines.append(f"| {' | '.join(cells)} |")
        if any(row.champion is not None and not row.comparable for row in self.rows):
            lines += ["", "In parentheses: measured otherwise, so not compared."]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """The verdict as JSON: ``passed``, and the fields of this class."""
        return json.dumps({"passed": self.passed, **asdict(self)}, indent=2) + "\n"


def _show(score: float | None) -> str:
    return "" if score is None else f"{score:.4g}"


def _show_difference(row: Row) -> str:
    if row.difference is None:
        return ""
    if row.interval is None:
        return f"{row.difference:+.3g}"
    return f"{row.difference:+.3g} [{row.interval[0]:+.3g}, {row.interval[1]:+.3g}], {row.pairs} pairs"


def compare(
    config: GateConfig,
    challenger: tuple[str, Record],
    champion: tuple[str, Record] | None,
    refusals: list[str] | None = None,
    notes: list[str] | None = None,
) -> Verdict:
    """Check a challenger, given as (version, record), by floors, ceilings and, against a champion, margins.

    Two scores can be compared if both records have the same contract, as far as it concerns that score (:func:`concerns`). A challenger
    that cannot be compared by a score that has a margin is held back, and so is one of which no score can be compared.

    Args:
        refusals: reasons of the caller for holding the challenger back.
        notes: of the caller, for the reader.
    """
    version, record = challenger
    refusals, notes = list(refusals or []), list(notes or [])
    if champion is None:
        notes.append("floors and ceilings decide")
    elif champion[0] == version:
        notes.append("the challenger is the champion")

    # 1. Which entries of the contract differ.
    old = champion[1] if champion else Record()
    changed = contract_changes(record.contract, old.contract) if champion and champion[0] != version else []
    if old.seen:
        notes.append(f"the champion has seen {len(old.seen)} test records in training, which are left out of the comparison")

    # 2. The checks of each score that a record has or the configuration names.
    rows: list[Row] = []
    incomparable: list[str] = []
    for metric in sorted({*record.scores, *config.floors, *config.ceilings, *config.margins}):
        comparable = champion is not None and not any(concerns(entry, metric) for entry in changed)
        difference = compare_scores(metric, record, old) if comparable else None
        rows += _rows(config, metric, record.scores.get(metric), old.scores.get(metric), comparable, difference)
        if champion and metric in config.margins and {metric} <= record.scores.keys() & old.scores.keys() and difference is None:
            incomparable.append(metric)

    # 3. What cannot be compared is held back.
    verdict = Verdict(version, champion[0] if champion else None, rows, notes, refusals)
    if incomparable:
        seen = "there are no outcomes for test records that the champion has not seen in training"
        why = f"evaluated differently ({', '.join(changed)})" if changed else seen
        refusals.append(f"{', '.join(incomparable)} cannot be compared with the champion's: {why}")
    elif champion and champion[0] != version and not verdict.compared:
        refusals.append("nothing could be compared with the champion: no score of both has a margin (gate.margins)")
    return verdict


def compare_scores(metric: str, new: Record, old: Record) -> Difference | None:
    """The difference of a score of two records with the same contract, without the test records that either model has seen in training.

    None if a record has no such score, or it cannot be had without those test records.
    """
    if metric not in new.scores or metric not in old.scores:
        return None
    seen = {*new.seen, *old.seen}
    asked = [key for key in new.outcomes.get(metric, {}) if key in old.outcomes.get(metric, {}) and record_of(key) not in seen]
    if asked:
        ours, theirs = ({key: record.outcomes[metric][key] for key in asked} for record in (new, old))
        mean = float(np.mean([ours[key] - theirs[key] for key in asked]))
        return Difference(mean, paired_differences(ours, theirs, RESAMPLES, SEED), len(asked))
    return None if seen else Difference(new.scores[metric] - old.scores[metric], None, 0)


def _rows(
    config: GateConfig, metric: str, score: float | None, base: float | None, comparable: bool, difference: Difference | None
) -> list[Row]:
    """The checks of one score, or one row without a check.

    Args:
        score: the challenger's; None if its record has no such score.
        base: the champion's; None if its record has no such score.
        comparable: False if they were measured differently.
        difference: None if they cannot be compared.
    """
    shown: dict[str, Any] = {"metric": metric, "challenger": score, "champion": base, "comparable": comparable}
    if difference:
        shown |= {"difference": difference.mean, "interval": difference.interval, "pairs": difference.pairs}
    missing = "the challenger's record has no such score"
    rows = []

    # 1. Limits that hold without a champion.
    for kind, limits, sign, failure in (("floor", config.floors, 1, "too low"), ("ceiling", config.ceilings, -1, "too high")):
        if metric in limits:
            passed = score is not None and sign * (score - limits[metric]) >= -ROUNDING
            reason = "" if passed else missing if score is None else failure
            rows.append(Row(check=f"{kind} {limits[metric]:g}", passed=passed, reason=reason, **shown))

    # 2. The margin. A score that the challenger has lost fails; one that it has gained has nothing to be compared with.
    if metric in config.margins and comparable:
        margin = config.margins[metric]
        check = f"margin {margin:g}"
        if difference:
            risk = difference.risk(margin, lower_is_better(metric))
            passed = risk <= config.max_risk
            reason = "" if passed else f"worse than the champion by more than {margin:g} with probability {risk:.2g}"
            rows.append(Row(check=check, passed=passed, reason=reason, risk=risk, **shown))
        elif score is None and base is None:
            rows.append(Row(check=check, passed=None, reason="neither record has such a score", **shown))
        elif score is None:
            rows.append(Row(check=check, passed=False, reason=missing, **shown))
        elif base is None:
            rows.append(Row(check=check, passed=None, reason="the champion's record has no such score", **shown))
    return rows or ([Row(check="none", passed=None, reason="", **shown)] if score is not None else [])


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
