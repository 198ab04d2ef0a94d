"""A decision is carried out: by force where the gate held the version back, never over a champion that nobody has compared with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from registry_support import CONFIG, aliases, evaluated, released

from cm3leon.registry import promotion, registry
from flows.approval import Candidate, Decision, carry_out

pytestmark = pytest.mark.slow

APPROVED = Decision(decision="approve", reason="the customer wants it", name="Anna")


def test_what_the_gate_held_back_is_promoted_by_force_with_the_reason(stages: Path) -> None:
    released(0.5)
    version = released(0.45)
    state = carry_out(Candidate(version=version.number, passed=False, champion="1", verdict="held back"), APPROVED)
    assert state.is_completed() and state.message == "version 2 is the champion, approved by Anna: the customer wants it"
    entry = promotion.history()[0]
    assert (entry.action, entry.version, entry.champion, entry.forced) == ("promote", "2", "1", True)
    assert entry.reason == "approved by Anna: the customer wants it"


@pytest.mark.parametrize(("score", "passed"), [(0.55, True), (0.45, False)])
def test_an_approval_does_not_replace_a_champion_that_was_not_compared(stages: Path, score: float, passed: bool) -> None:
    released(0.5)
    waits = registry.register(evaluated(score), CONFIG)
    assert promotion.gate(CONFIG).passed == passed
    released(0.6)
    state = carry_out(Candidate(version=waits.number, passed=passed, champion="1", verdict="as the gate says"), APPROVED)
    assert state.is_failed()
    assert state.message == "version 2 is not promoted: it was compared with version 1; the champion is version 3"
    assert aliases()["champion"] == 3


def test_a_rejected_version_is_known_until_it_is_promoted(stages: Path) -> None:
    version = released(0.3)
    state = carry_out(
        Candidate(version=version.number, passed=False, champion=None, verdict="held back"),
        APPROVED.model_copy(update={"decision": "reject"}),
    )
    assert (state.name, state.message) == ("Rejected", "version 1 is not promoted, rejected by Anna: the customer wants it")
    before = promotion.history()
    promotion.gate(CONFIG)
    assert promotion.history() == before  # the same comparison again is no news
    rejected = promotion.rejection("1")
    assert rejected and rejected.sentence == "rejected version 1, no champion before"
    promotion.promote("1", force=True, reason="another mind")
    assert promotion.rejection("1") is None
