"""The promotion ledger: who changed the champion, or tried to, when, and why. Entries are only added.

An entry is a finished run of the MLflow experiment ``cm3leon-promotions``: its tags say what happened, and ``gate.md`` and ``gate.json``
keep the gate's table as it was. So the ledger is where the models are, can be read in MLflow's pages, and two entries written at once do
not disturb each other.
"""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from cm3leon.registry.gate import Verdict
from cm3leon.tracking import store
from cm3leon.tracking.runs import FLOW_RUN_ENV

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "cm3leon-promotions"
Action = Literal["gate", "propose", "promote", "reject", "rollback"]
WORDS: dict[Action, tuple[str, str]] = {
    "gate": ("compared", "with"),
    "propose": ("proposed", "over"),
    "promote": ("promoted", "over"),
    "reject": ("rejected", "and kept"),
    "rollback": ("rolled back to", "from"),
}
"""What was done with the version, and what stands before the champion."""
PAGE = 500
"""Entries that are read with one request."""


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Attributes:
        action: ``gate`` (a comparison that promoted nothing by itself), ``propose`` (it waits for a person's decision), ``promote``,
            ``reject`` or ``rollback``.
        version: the version that was compared, waits, became the champion or was rejected.
        champion: the champion before; None if there was none.
        verdict: the gate's, in a sentence; that of the last comparison for a proposal, promotion or rejection, empty for a rollback.
        forced: promoted against the gate.
        reason: what the person said; empty if nobody was asked.
        time: UTC.
        who: user and host.
        flow_run: id of the Prefect flow run that did it, if one did.
        until: of a proposal, the end of its time, UTC: without a decision until then it is rejected (:func:`with_lapses`).
    """

    action: Action
    version: str
    champion: str | None
    verdict: str = ""
    forced: bool = False
    reason: str = ""
    time: datetime | None = None
    who: str = ""
    flow_run: str = ""
    until: datetime | None = None

    @property
    def sentence(self) -> str:
        """What happened: "promoted version 3 over 2, forced"."""
        did, before = WORDS[self.action]
        against = f" {before} version {self.champion}" if self.champion else ", no champion before"
        waits = f", waits for a decision until {self.until:%Y-%m-%d %H:%M} UTC" if self.until else ""
        return f"{did} version {self.version}{against}{', forced' if self.forced else ''}{waits}"


def append(client: MlflowClient, entry: Entry, verdict: Verdict | None = None) -> None:
    """Add an entry, with the present time and user; ``verdict`` adds the gate's table.

    Raises:
        mlflow.exceptions.MlflowException: if the store does not take it.
    """
    tags = {
        "action": entry.action,
        "version": entry.version,
        "champion_before": entry.champion or "",
        "verdict": entry.verdict,
        "forced": str(entry.forced).lower(),
        "reason": entry.reason,
        "who": _user(),
        "prefect.flow_run_id": os.environ.get(FLOW_RUN_ENV, ""),
        "until": entry.until.isoformat() if entry.until else "",
    }
    experiment_id = store.experiment_id_of(client, client.tracking_uri, EXPERIMENT)
    run = client.create_run(experiment_id, run_name=entry.sentence, tags={name: value for name, value in tags.items() if value})
    if verdict:
        client.log_text(run.info.run_id, verdict.to_markdown(), "gate.md")
        client.log_text(run.info.run_id, verdict.to_json(), "gate.json")
    client.set_terminated(run.info.run_id)


def read(client: MlflowClient) -> list[Entry]:
    """All entries, newest first, with the rejections by the time limit."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    entries, token = [], None
    while True:
        page = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"], max_results=PAGE, page_token=token)
        entries += [_entry(run) for run in page]
        token = page.token
        if not token:
            return with_lapses(entries, datetime.now(UTC))


def with_lapses(entries: Sequence[Entry], now: datetime) -> list[Entry]:
    """The entries, newest first, and a rejection by the time limit for each proposal about which nobody decided in time.

    No process waits while a person decides, so that none could write such an entry; that it is one follows from the others.
    """
    found = list(entries)
    for position, proposal in enumerate(entries):
        if proposal.until is None or proposal.until > now:
            continue
        later = [entry for entry in entries[:position] if entry.version == proposal.version and entry.action != "gate"]
        if not any(entry.flow_run == proposal.flow_run or _time(entry) <= proposal.until for entry in later):
            reason = "nobody decided within the time limit"
            found.append(replace(proposal, action="reject", reason=reason, time=proposal.until, who="time limit", until=None))
    return sorted(found, key=_time, reverse=True)


def waiting(entries: Sequence[Entry]) -> set[str]:
    """Versions that wait for a decision; ``entries`` are newest first."""
    newest: dict[str, Entry] = {}
    for entry in entries:
        if entry.action != "gate":
            newest.setdefault(entry.version, entry)
    return {version for version, entry in newest.items() if entry.action == "propose"}


def _time(entry: Entry) -> datetime:
    assert entry.time  # as read
    return entry.time


def _entry(run: Any) -> Entry:
    tags = run.data.tags
    return Entry(
        action=tags["action"],
        version=tags["version"],
        champion=tags.get("champion_before") or None,
        verdict=tags.get("verdict", ""),
        forced=tags.get("forced") == "true",
        reason=tags.get("reason", ""),
        time=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
        who=tags.get("who", ""),
        flow_run=tags.get("prefect.flow_run_id", ""),
        until=datetime.fromisoformat(tags["until"]) if "until" in tags else None,
    )


def _user() -> str:
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"
