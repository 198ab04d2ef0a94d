"""Gate, promotion and rollback: they decide which version has the alias ``champion``, and write the ledger.

    version = register_outputs(config)
    if gate(config, version).passed:
        promote()

The evaluation record is read once on its way to the gate: when the bundle is built. Each step is idempotent.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cm3leon.config.schema import Config
from cm3leon.config.writer import params_text
from cm3leon.evaluation.record import Record, digest
from cm3leon.registry import ledger
from cm3leon.registry.bundle import read_record
from cm3leon.registry.gate import Verdict, compare, contract_changes
from cm3leon.registry.registry import (
    CHALLENGER,
    CHAMPION,
    MODEL_NAME,
    PREVIOUS_CHAMPION,
    Version,
    all_versions,
    connect,
    fetch_bundle,
    holder,
    publish,
    publish_changed,
)
from cm3leon.registry.release import sheets_page
from cm3leon.services.child import run_command
from cm3leon.training.launch import process_count, torchrun_command, torchrun_environment
from cm3leon.utils.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

SAMPLES = "samples.png"
GATE_TAG, REPLACED_TAG, ROLLED_BACK_TAG = "gate", "replaced", "rolled_back"
NOT_COMPARED = "not compared by the gate yet"
OF_THE_MODEL = ("image_path", "super_resolution", "tasks/")
"""Beginnings of a contract's entries that depend on the model: its image size, and what fits in its context."""


class PromotionError(UserError):
    """A promotion or rollback is not possible; the message says why."""


# --- gate ------------------------------------------------------------------------------------------------------------


def gate(config: Config, registered: Version | None = None, number: str | None = None) -> Verdict:
    """Compare a version with the champion (``cm3leon/registry/gate.py``).

    The verdict is logged to the version's run and added to the ledger. Where the champion was evaluated otherwise than the version, it is
    evaluated again, on the data in this directory; that takes as long as the stage ``evaluate``.

    Args:
        registered: the version as :func:`~cm3leon.registry.registry.register` returned it, with its record; None reads the record from the
            registry.
        number: of the version; None takes the challenger.

    Raises:
        PromotionError: if there is no such version, or one has no run.
        IncompleteRecordError: if a record in the registry is damaged.
    """
    client = connect()
    versions = all_versions(client)
    challenger, champion = _chosen(versions, number), holder(versions, CHAMPION)
    refusals: list[str] = []
    notes: list[str] = []
    if ROLLED_BACK_TAG in challenger.tags and challenger != champion:
        refusals.append(f"version {challenger} was the champion and was rolled back")
    known = registered.record if registered and registered.number == challenger.number else None
    record = known or registered_record(client, challenger)
    # Registering an unchanged model again makes the champion the challenger.
    against = None
    if champion:
        against = (champion.number, record if champion == challenger else _champion_record(client, champion, record, config, notes))
    verdict = compare(config.gate, (challenger.number, record), against, refusals, notes)
    client.log_text(_run_id(challenger), verdict.to_markdown(), "gate.md")
    client.log_text(_run_id(challenger), verdict.to_json(), "gate.json")
    client.set_model_version_tag(MODEL_NAME, challenger.number, GATE_TAG, _gate_tag(verdict.passed, champion))
    if champion != challenger:
        entry = ledger.Entry("gate", challenger.number, champion.number if champion else None, str(verdict))
        # A run that changes nothing compares the same versions again.
        of_version = [old for old in ledger.read(client) if old.version == entry.version]
        before = next((old for old in of_version if old.action not in ("propose", "reject")), None)
        if before is None or (before.action, before.champion, before.verdict) != (entry.action, entry.champion, entry.verdict):
            sheets = _sheets(client, challenger, champion, record)
            client.log_text(_run_id(challenger), sheets_page(verdict.to_markdown(), sheets), "gate.html")
            ledger.append(client, entry, verdict)
            publish(client, replace(challenger, record=record))
    return verdict


def _champion_record(client: MlflowClient, champion: Version, record: Record, config: Config, notes: list[str]) -> Record:
    """The champion's record under the contract of ``record``: the registered one, or that of a new evaluation, which is kept in its run."""
    stored = registered_record(client, champion)
    changed = contract_changes(record.contract, stored.contract)
    if stored.outcomes and not changed:
        return stored
    notes.append(f"the champion was evaluated again ({', '.join(changed) or 'its record has no outcomes'})")
    place = _place(record)
    with tempfile.TemporaryDirectory() as folder:
        if client.list_artifacts(_run_id(champion), place):
            return Record.read(Path(client.download_artifacts(_run_id(champion), place, folder)))
        try:
            again = evaluate_version(champion, config, Path(folder))
        except (UserError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            notes[-1] = f"the champion could not be evaluated again ({type(error).__name__}: {error})"
            return stored
        # Where data or parameters are no longer those of the record, this is another evaluation than was wanted, and is not kept as it.
        if all(entry.startswith(OF_THE_MODEL) for entry in contract_changes(record.contract, again.contract)):
            client.log_artifacts(_run_id(champion), folder, place)
        return again


def _place(record: Record) -> str:
    """Where a champion's run keeps its evaluation under the contract of ``record``."""
    return f"evaluations/{digest(record.contract)}"


def _sheets(client: MlflowClient, challenger: Version, champion: Version | None, record: Record) -> dict[str, bytes]:
    """The sheets of samples of both versions, of the same prompts, by the version's name."""
    wanted = [(challenger, "evaluation")]
    if champion:
        again = client.list_artifacts(_run_id(champion), _place(record))
        wanted.append((champion, _place(record) if again else "evaluation"))
    found = {}
    for version, place in wanted:
        if any(file.path == f"{place}/{SAMPLES}" for file in client.list_artifacts(_run_id(version), place)):
            with tempfile.TemporaryDirectory() as folder:
                found[f"version {version}"] = Path(client.download_artifacts(_run_id(version), f"{place}/{SAMPLES}", folder)).read_bytes()
    return found


def evaluate_version(version: Version, config: Config, output: Path) -> Record:
    """Evaluate a registered version on the present data and by the present contract; see :func:`cm3leon.evaluation.run.evaluate`.

    It takes as many processes as the stage ``evaluate``.

    Raises:
        UserError: as :func:`~cm3leon.evaluation.run.evaluate`, or if one of several processes fails.
    """
    model = f"models:/{MODEL_NAME}/{version}"
    if (processes := process_count(config.launch)) > 1:
        return _evaluate_in_processes(model, config, output, processes)
    from cm3leon.evaluation.run import evaluate
    from cm3leon.generation.generator import Generator

    return evaluate(config, output, Generator.from_bundle(fetch_bundle(model)))


def _evaluate_in_processes(model: str, config: Config, output: Path, processes: int) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        params, found = Path(folder) / "params.yaml", Path(folder) / "evaluation"
        params.write_text(params_text(config))
        command = ["evaluate", "--model", model, "--params", str(params), "--out", str(found)]
        done = run_command(torchrun_command(command, processes, ""), partial(print, flush=True), torchrun_environment(processes))
        if done.status != 0:
            raise UserError(f"evaluation of {model} failed: {done.tail[-1] if done.tail else f'exit status {done.status}'}")
        shutil.copytree(found, output, dirs_exist_ok=True)
    return Record.read(output)


def _chosen(versions: list[Version], number: str | None) -> Version:
    """The version ``number``; None: the challenger."""
    if number is None:
        challenger = holder(versions, CHALLENGER)
        if challenger is None:
            raise PromotionError("no version of the model has the alias challenger; run: cm3leon register")
        return challenger
    found = next((version for version in versions if version.number == number), None)
    if found is None:
        known = ", ".join(version.number for version in versions) or "none"
        raise PromotionError(f"the registry has no version {number}; versions: {known}")
    return found


def _run_id(version: Version) -> str:
    if version.run_id is None:
        raise PromotionError(f"version {version} has no run, so no evaluation record; register the model by: cm3leon register")
    return version.run_id


def registered_record(client: MlflowClient, version: Version) -> Record:
    """The evaluation record that was registered with a version."""
    with tempfile.TemporaryDirectory() as folder:
        return read_record(Path(client.download_artifacts(_run_id(version), "evaluation", folder)))


def _gate_tag(passed: bool, champion: Version | None) -> str:
    return f"{'passed' if passed else 'held back'} against {f'version {champion}' if champion else 'no champion'}"


# --- promotion -------------------------------------------------------------------------------------------------------


def promote(number: str | None = None, force: bool = False, reason: str = "") -> Version:
    """Make a version the champion and the champion the previous champion; no change if it is the champion.

    Args:
        number: of the version; None takes the challenger.
        force: promote also a version that the gate has not passed against the present champion; needs a reason.
        reason: is kept in the ledger.

    Raises:
        PromotionError: if there is no such version, the gate has not passed it, or a forced promotion has no reason.
    """
    client = connect()
    versions = all_versions(client)
    chosen, champion = _chosen(versions, number), holder(versions, CHAMPION)
    if champion is not None and champion.number == chosen.number:
        return champion
    against = f"version {champion}" if champion else "none"
    state = chosen.tags.get(GATE_TAG, NOT_COMPARED)
    passed = state == _gate_tag(True, champion)
    if passed and ROLLED_BACK_TAG in chosen.tags:  # the gate passed it before that
        passed, state = False, f"it was rolled back {chosen.tags[ROLLED_BACK_TAG]}"
    if not passed and not force:
        which = "" if number is None else f" --version {number}"
        raise PromotionError(f"version {chosen} is not promoted: {state}; the champion is {against}; run: cm3leon gate{which}")
    if not passed and not reason.strip():
        raise PromotionError(f"version {chosen} is promoted against the gate ({state}) only with a reason: --force --reason TEXT")

    # The ledger first: no promotion without a trace.
    entry = ledger.Entry("promote", chosen.number, champion.number if champion else None, state, not passed, reason.strip())
    ledger.append(client, entry)
    if champion is not None:
        client.set_model_version_tag(MODEL_NAME, chosen.number, REPLACED_TAG, champion.number)
        client.set_registered_model_alias(MODEL_NAME, PREVIOUS_CHAMPION, champion.number)
    _make_champion(client, chosen)
    return _published(client, versions)


def _make_champion(client: MlflowClient, version: Version) -> None:
    """Make a version the champion; that it was rolled back once no longer counts."""
    if ROLLED_BACK_TAG in version.tags:
        client.delete_model_version_tag(MODEL_NAME, version.number, ROLLED_BACK_TAG)
    client.set_registered_model_alias(MODEL_NAME, CHAMPION, version.number)


def champion() -> Version | None:
    """The version that is the champion; None if there is none yet."""
    return holder(all_versions(connect()), CHAMPION)


def propose(number: str, until: datetime) -> ledger.Entry:
    """Enter into the ledger that a version waits for a person's decision; returns the entry.

    Args:
        until: UTC; without a decision until then the version counts as rejected.

    Raises:
        PromotionError: if there is no such version.
    """
    return _enter("propose", number, until=until)


def reject(number: str, reason: str) -> ledger.Entry:
    """Enter into the ledger that a person decided against a version; returns the entry.

    Raises:
        PromotionError: if there is no such version.
    """
    return _enter("reject", number, reason=reason)


def _enter(action: ledger.Action, number: str, reason: str = "", until: datetime | None = None) -> ledger.Entry:
    """Enter what changes no alias into the ledger, and write the release of the version anew."""
    client = connect()
    versions = all_versions(client)
    version, champion = _chosen(versions, number), holder(versions, CHAMPION)
    state = version.tags.get(GATE_TAG, NOT_COMPARED)
    entry = ledger.Entry(action, version.number, champion.number if champion else None, state, reason=reason, until=until)
    ledger.append(client, entry)
    publish(client, version)
    return entry


def rejection(number: str) -> ledger.Entry | None:
    """The entry by which a version was rejected, by a person or by the time limit; None if it was not, or was promoted since."""
    decisions = (entry for entry in history() if entry.version == number and entry.action in ("promote", "reject"))
    last = next(decisions, None)
    return last if last and last.action == "reject" else None


def rollback(to: str | None = None, reason: str = "") -> Version:
    """Make an earlier champion the champion again, and the one before it the previous champion.

    The version that was rolled back is tagged, so that the gate does not pass it again.

    Args:
        to: the version; None takes the previous champion.
        reason: is kept in the ledger.

    Raises:
        PromotionError: if there is no previous champion, or ``to`` was never the champion.
    """
    client = connect()
    versions = all_versions(client)
    champion, previous = holder(versions, CHAMPION), holder(versions, PREVIOUS_CHAMPION)
    target = previous if to is None else _chosen(versions, to)
    if champion is None or target is None:
        raise PromotionError("there is no previous champion to roll back to; cm3leon status lists the versions and their aliases")
    if target.number == champion.number:
        raise PromotionError(f"version {target} is the champion already")
    champions = {entry.version for entry in ledger.read(client) if entry.action == "promote"}
    if target != previous and target.number not in champions:
        raise PromotionError(f"version {target} was never the champion; run: cm3leon promote --version {target}")

    ledger.append(client, ledger.Entry("rollback", target.number, champion.number, reason=reason.strip()))
    client.set_model_version_tag(MODEL_NAME, champion.number, ROLLED_BACK_TAG, f"to version {target}")
    _make_champion(client, target)
    before = target.tags.get(REPLACED_TAG)
    if before in {version.number for version in versions} and before != target.number:
        client.set_registered_model_alias(MODEL_NAME, PREVIOUS_CHAMPION, before)
    elif previous is not None:
        client.delete_registered_model_alias(MODEL_NAME, PREVIOUS_CHAMPION)
    return _published(client, versions)


def _published(client: MlflowClient, before: list[Version]) -> Version:
    """Write the releases anew of the versions whose aliases are no longer those of ``before``; returns the new champion."""
    versions = all_versions(client)
    publish_changed(client, before, versions)
    champion = holder(versions, CHAMPION)
    assert champion is not None
    return champion


def history() -> list[ledger.Entry]:
    """The ledger, newest first."""
    return ledger.read(connect())
