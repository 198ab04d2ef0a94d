"""The champion measured again: its scores must stay in the intervals that its evaluation record has.

The model, prompts and seed are those of the record, so a score that moved tells of what else changed: data, libraries or the hardware.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cm3leon.config.schema import Config
from cm3leon.evaluation.record import TOLERANCE, Record
from cm3leon.evaluation.run import recorded_config
from cm3leon.registry.gate import contract_changes
from cm3leon.registry.promotion import evaluate_version, registered_record
from cm3leon.registry.registry import CHAMPION, Version, all_versions, connect, holder
from cm3leon.utils.errors import UserError


@dataclass(frozen=True)
class Check:
    """A score of the record, and the same score now; None if it was not measured any more."""

    score: str
    recorded: float
    low: float
    high: float
    now: float | None

    @property
    def inside(self) -> bool:
        """Whether the score is in its interval, up to the decimals of a record."""
        return self.now is not None and self.low - TOLERANCE <= self.now <= self.high + TOLERANCE

    def __str__(self) -> str:
        now = "not measured" if self.now is None else f"{self.now:.4g}"
        return f"{self.score} {now} (recorded {self.recorded:.4g} [{self.low:.4g}, {self.high:.4g}])"


@dataclass(frozen=True)
class Recheck:
    """A champion, and a check of each of its scores that has an interval."""

    version: Version
    checks: list[Check]

    @property
    def left(self) -> list[Check]:
        """The scores that left their intervals."""
        return [check for check in self.checks if not check.inside]

    def to_markdown(self) -> str:
        """A sentence, and a table of all scores, those that left their intervals first."""
        found = (
            f"{len(self.left)} of {len(self.checks)} scores left their intervals." if self.left else "All scores are in their intervals."
        )
        lines = [
            f"## Version {self.version}, measured again",
            "",
            found,
            "",
            "| score | recorded | interval | now | |",
            "|---|---:|---:|---:|---|",
        ]
        for check in sorted(self.checks, key=lambda check: check.inside):
            now = "" if check.now is None else f"{check.now:.4g}"
            lines.append(
                f"| {check.score} | {check.recorded:.4g} | {check.low:.4g} to {check.high:.4g} | {now} | {'' if check.inside else 'left'} |"
            )
        return "\n".join(lines) + "\n"


def recheck_champion(config: Config, output: Path) -> Recheck:
    """Evaluate the champion with the settings of its record; the new record is written to ``output`` and kept in the champion's run.

    Raises:
        UserError: if there is no champion, its record has no settings, or the present data give another contract, with which scores are
            not comparable.
    """
    client = connect()
    champion = holder(all_versions(client), CHAMPION)
    if champion is None or champion.run_id is None:
        raise UserError("there is no champion with an evaluation record; run: cm3leon promote")
    recorded = registered_record(client, champion)
    now = evaluate_version(champion, recorded_config(config, recorded, f"the record of version {champion}"), output)
    if changed := contract_changes(now.contract, recorded.contract):
        raise UserError(
            f"version {champion} was evaluated on other data or code ({', '.join(changed)}), so its scores are not comparable; "
            "check out those of its record (cm3leon lineage, dvc checkout), or promote a version of the present data"
        )
    client.log_artifacts(champion.run_id, str(output), f"evaluations/{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}")
    return Recheck(champion, _checks(recorded, now))


def _checks(recorded: Record, now: Record) -> list[Check]:
    return [Check(name, recorded.scores[name], low, high, now.scores.get(name)) for name, (low, high) in sorted(recorded.intervals.items())]
