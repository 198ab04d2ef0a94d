"""A proposal about which nobody decides in time is rejected, and stays so, whatever is entered later."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from cm3leon.registry.ledger import Entry, waiting, with_lapses

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
PROPOSAL = Entry("propose", "3", "2", "held back", time=START, who="me@here", flow_run="a", until=START + timedelta(hours=72))


def after(hours: float, entry: Entry) -> Entry:
    return replace(entry, time=START + timedelta(hours=hours))


def actions(*entries: Entry, now: float) -> list[str]:
    """What the ledger, oldest first here, says at a time in hours after the proposal."""
    found = with_lapses(entries[::-1], START + timedelta(hours=now))
    return [entry.action for entry in found[::-1]]


def test_without_a_decision_the_time_limit_rejects() -> None:
    assert actions(PROPOSAL, now=71.9) == ["propose"]
    [lapse, _] = with_lapses([PROPOSAL], START + timedelta(hours=73))
    assert (lapse.action, lapse.version, lapse.who, lapse.flow_run) == ("reject", "3", "time limit", "a")
    assert lapse.time == PROPOSAL.until and lapse.reason == "nobody decided within the time limit"
    assert lapse.sentence == "rejected version 3 and kept version 2"
    assert PROPOSAL.sentence == "proposed version 3 over version 2, waits for a decision until 2026-03-04 12:00 UTC"
    gate = after(80, Entry("gate", "3", "2"))
    promotion = after(90, Entry("promote", "3", "2", forced=True))
    assert actions(PROPOSAL, gate, promotion, now=100) == ["propose", "reject", "gate", "promote"]


def test_a_decision_in_time_counts_also_if_it_is_carried_out_a_little_later() -> None:
    for action in ("promote", "reject"):
        decided = Entry(action, "3", "2", flow_run="a")
        for hours in (10, 72.1):
            assert actions(PROPOSAL, after(hours, decided), now=100) == ["propose", action]
    by_hand = Entry("promote", "3", "2")
    assert actions(PROPOSAL, after(10, by_hand), now=100) == ["propose", "promote"]
    other = after(10, Entry("promote", "4", "2"))
    assert actions(PROPOSAL, other, now=100) == ["propose", "promote", "reject"]


def test_a_second_proposal_has_a_time_of_its_own() -> None:
    again = replace(after(10, PROPOSAL), flow_run="b", until=START + timedelta(hours=82))
    assert actions(PROPOSAL, again, now=80) == ["propose", "propose"]
    assert actions(PROPOSAL, again, now=90) == ["propose", "propose", "reject"]


def test_a_version_waits_until_it_is_decided_on() -> None:
    gate = after(1, Entry("gate", "3", "2"))
    assert waiting([gate, PROPOSAL]) == {"3"}
    assert waiting([Entry("reject", "3", "2"), gate, PROPOSAL]) == set()
