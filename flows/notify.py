"""Messages about a run: it failed, the gate held a version back, a version became the champion.

They are sent by every notification block of Prefect that is named ``cm3leon``, of whatever type: ``custom-webhook/cm3leon``,
``slack-webhook/cm3leon``, ``smtp-email/cm3leon``. Without such a block nothing is sent. Addresses and passwords stay in the blocks. If a
message cannot be sent, the run's log has a warning, and the run goes on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from logging import Logger, LoggerAdapter
from typing import Any, Literal
from uuid import UUID

from prefect import get_client, get_run_logger
from prefect.blocks.core import Block
from prefect.blocks.notifications import AppriseNotificationBlock
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from prefect.logging.loggers import flow_run_logger
from prefect.runtime import flow_run as this_run
from prefect.utilities.urls import url_for
from pydantic import Field, SecretStr

BLOCK = "cm3leon"
"""Name of the blocks that are used."""
Log = Logger | LoggerAdapter[Any]


class SmtpEmail(AppriseNotificationBlock):
    """E-mail by an SMTP server; Prefect's own block for e-mail is of one provider."""

    _block_type_name = "SMTP Email"
    _block_type_slug = "smtp-email"

    url: SecretStr = Field(
        title="Address",
        description="Apprise's form of server, user, password and recipients.",
        examples=["mailtos://user:password@smtp.example.com?from=cm3leon@example.com&to=team@example.com"],
    )


def tell_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """Hook of a flow, for its states Failed and Crashed: the message has the error, which is that of the first stage that failed.

    A crashed run of no deployment was started by hand, and whoever interrupted it knows.
    """
    if state.is_crashed() and flow_run.deployment_id is None:
        return
    _send(flow_run_logger(flow_run, flow), f"cm3leon: run {flow_run.name} {state.name}", str(state.message), flow_run.id)


def tell_promotion(action: Literal["gate", "promote"]) -> None:
    """Send what this run has entered into the promotion ledger: its comparison, or its promotion.

    A comparison that says the same as the one before it is not entered, so a version that stays held back is told of once.
    """
    from cm3leon.registry import promotion

    if this_run.id is None:
        return
    log = get_run_logger()
    with _only_warns(log, "no message was sent"):
        entry = next((entry for entry in promotion.history() if (entry.action, entry.flow_run) == (action, this_run.id)), None)
        if entry is None:
            return
        happened = "held back by the gate" if action == "gate" else "the champion"
        lines = [f"run {this_run.name}, {entry.who}: {entry.sentence}", entry.verdict, f"reason: {entry.reason}" if entry.reason else ""]
        _send(log, f"cm3leon: version {entry.version} is {happened}", "\n".join(line for line in lines if line), UUID(this_run.id))


def _send(log: Log, subject: str, body: str, run_id: UUID) -> None:
    """Send a message by all blocks, with a link to the run's page unless the run has a server of its own, which ends with it."""
    if "PREFECT_API_URL" in os.environ:
        body += f"\n{url_for('flow-run', run_id)}"
    with _only_warns(log, "no message was sent"):
        for name in _blocks():
            with _only_warns(log, f"no message was sent by the block {name}"):
                block: Any = Block.load(name)  # its base class has notify as a coroutine; called from here it is none
                with block.raise_on_failure():
                    block.notify(body, subject)


def _blocks() -> list[str]:
    """The notification blocks with our name, as TYPE/NAME."""
    wanted = {"block_documents": {"name": {"any_": [BLOCK]}}, "block_schemas": {"block_capabilities": {"all_": ["notify"]}}}
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/block_documents/filter", json=wanted).json()
    return [f"{document['block_type']['slug']}/{document['name']}" for document in found]


@contextmanager
def _only_warns(log: Log, what: str) -> Iterator[None]:
    """Make an error a warning. Of the error only the kind is told, as texts of errors name addresses, which may be secret."""
    try:
        yield
    except Exception as error:
        answer = getattr(error, "response", None)
        log.warning("%s: %s%s", what, type(error).__name__, f", status {answer.status_code}" if answer is not None else "")
