"""The champion measured again: what left its interval is said first."""

from datetime import UTC, datetime

from cm3leon.registry.recheck import Check, Recheck
from cm3leon.registry.registry import Version


def report(now: float) -> str:
    checks = [Check("cider", 1.0, 0.5, 1.5, 1.0), Check("composition", 0.4, 0.3, 0.5, now)]
    return Recheck(Version("2", None, datetime.now(UTC)), checks).to_markdown()


def test_scores_that_left_their_intervals_come_first() -> None:
    assert "All scores are in their intervals." in report(0.4)
    left = report(0.1)
    assert "1 of 2 scores left their intervals." in left
    assert left.index("| composition | 0.4 | 0.3 to 0.5 | 0.1 | left |") < left.index("| cider |")
