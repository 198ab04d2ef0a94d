"""The gate on registered versions, promotion and rollback: by aliases, each with an entry in the ledger."""

from __future__ import annotations

import getpass
import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from registry_support import CONFIG, aliases, evaluated, released

from cm3leon.config import paths
from cm3leon.evaluation.record import Record
from cm3leon.registry import ledger, promotion, registry
from cm3leon.registry.promotion import PromotionError
from cm3leon.registry.registry import CHALLENGER, CHAMPION, PREVIOUS_CHAMPION


def history() -> list[tuple[str, str, str | None, bool]]:
    return [(entry.action, entry.version, entry.champion, entry.forced) for entry in reversed(promotion.history())]


def test_three_versions_from_registration_to_rollback(stages: Path) -> None:
    """Promoted, held back, promoted, rolled back, not promoted again, forced."""
    with pytest.raises(PromotionError, match="challenger"):
        promotion.promote()
    released(0.5)
    assert aliases() == {CHALLENGER: 1, CHAMPION: 1}
    released(0.45)
    assert aliases() == {CHALLENGER: 2, CHAMPION: 1}
    with pytest.raises(PromotionError, match="held back"):
        promotion.promote()
    released(0.6)
    assert aliases() == {CHALLENGER: 3, CHAMPION: 3, PREVIOUS_CHAMPION: 1}
    promotion.promote()
    released(0.6)
    assert aliases() == {CHALLENGER: 3, CHAMPION: 3, PREVIOUS_CHAMPION: 1}

    assert promotion.rollback(reason="it is rude").number == "1"
    assert aliases() == {CHALLENGER: 3, CHAMPION: 1}
    with pytest.raises(PromotionError, match="no previous champion"):
        promotion.rollback()
    released(0.6)
    assert aliases() == {CHALLENGER: 3, CHAMPION: 1}
    with pytest.raises(PromotionError, match="only with a reason"):
        promotion.promote(force=True)
    promotion.promote(force=True, reason="the customer wants it")
    assert aliases() == {CHALLENGER: 3, CHAMPION: 3, PREVIOUS_CHAMPION: 1}

    client = registry.connect()
    [newest, *_] = registry.status()
    assert newest.run_id and newest.scores["composition"] == 0.6
    assert {"gate.md", "gate.json", "evaluation", "lineage.json"} <= {file.path for file in client.list_artifacts(newest.run_id)}
    assert client.get_run(newest.run_id).data.metrics == {}  # evaluate has logged the scores
    assert history() == [
        ("gate", "1", None, False), ("promote", "1", None, False),
        ("gate", "2", "1", False),
        ("gate", "3", "1", False), ("promote", "3", "1", False),
        ("rollback", "1", "3", False),
        ("gate", "3", "1", False), ("promote", "3", "1", True),
    ]  # fmt: skip
    last, _, rolled_back, *_ = promotion.history()
    assert last.reason == "the customer wants it" and "held back" in last.verdict and rolled_back.reason == "it is rude"
    assert all(entry.time and entry.who.startswith(f"{getpass.getuser()}@") for entry in promotion.history())


def test_the_ledger_keeps_each_table_of_the_gate(stages: Path) -> None:
    for composition in (0.5, 0.45, 0.6):
        released(composition)
    client = registry.connect()
    experiment = client.get_experiment_by_name(ledger.EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id], "tags.action = 'gate'", order_by=["attributes.start_time"])
    tables = [json.loads(Path(client.download_artifacts(run.info.run_id, "gate.json")).read_text()) for run in runs]
    assert [(table["challenger"], table["champion"], table["passed"]) for table in tables] == [
        ("1", None, True), ("2", "1", False), ("3", "1", True),
    ]  # fmt: skip


def test_comparing_the_same_again_adds_nothing(stages: Path) -> None:
    released(0.5)
    released(0.45)
    before = promotion.history()
    released(0.45)
    assert promotion.history() == before


def test_a_named_version_is_compared_and_promoted(stages: Path) -> None:
    released(0.5)
    released(0.45)
    registry.register(evaluated(0.6), CONFIG)
    with pytest.raises(PromotionError, match=r"version 3 is not promoted: not compared by the gate yet.*cm3leon gate --version 3"):
        promotion.promote("3")
    assert not promotion.gate(CONFIG, number="2").passed
    assert promotion.gate(CONFIG, number="3").passed
    assert promotion.promote("3").number == "3"
    promotion.promote("2", force=True, reason="to compare the two")
    assert aliases() == {CHALLENGER: 3, CHAMPION: 2, PREVIOUS_CHAMPION: 3}
    with pytest.raises(PromotionError, match="no version 9; versions: 3, 2, 1"):
        promotion.promote("9")

    assert promotion.rollback("1").number == "1"
    with pytest.raises(PromotionError, match="version 1 is the champion already"):
        promotion.rollback("1")


def test_a_version_that_was_rolled_back_and_is_the_champion_again_is_gated_as_others(stages: Path) -> None:
    released(0.5)
    released(0.6)
    promotion.rollback()
    assert not promotion.gate(CONFIG, number="2").passed
    promotion.rollback("2")
    released(0.65)
    assert promotion.gate(CONFIG, number="2").refusals == []


def test_a_version_that_was_rolled_back_is_not_promoted_by_what_the_gate_said_before(stages: Path) -> None:
    released(0.5)
    released(0.6)
    promotion.rollback(reason="it is rude")
    with pytest.raises(PromotionError, match="version 2 is not promoted: it was rolled back to version 1; the champion is version 1"):
        promotion.promote()
    with pytest.raises(PromotionError, match="only with a reason"):
        promotion.promote(force=True)
    assert aliases() == {CHALLENGER: 2, CHAMPION: 1}


def test_a_version_that_never_was_the_champion_is_no_rollback(stages: Path) -> None:
    released(0.5)
    released(0.45)
    with pytest.raises(PromotionError, match="version 2 was never the champion"):
        promotion.rollback("2")


def test_a_version_registered_without_a_run_is_refused(project: Path) -> None:
    client: MlflowClient = registry.connect()
    client.create_registered_model(registry.MODEL_NAME)
    client.create_model_version(registry.MODEL_NAME, (project / "elsewhere").as_uri())
    client.set_registered_model_alias(registry.MODEL_NAME, CHALLENGER, "1")
    with pytest.raises(PromotionError, match="version 1 has no run, so no evaluation record"):
        promotion.gate(CONFIG)


def test_the_record_is_read_once_on_its_way_to_the_gate(stages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released(0.5)
    evaluated(0.6)
    read, real = [], Record.read.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Record, "read", classmethod(lambda cls, folder: read.append(str(folder)) or real(cls, folder)))  # type: ignore[func-returns-value]
    version = registry.register_outputs(CONFIG)
    assert read.count(str(paths.EVALUATION)) == 1
    before = len(read)  # with that of the version whose release no longer says challenger
    assert promotion.gate(CONFIG, version).passed
    assert len(read) == before + 1  # the champion's
    by_itself = promotion.gate(CONFIG)
    assert by_itself.passed and len(read) == before + 3


def test_promotion_needs_a_gate_passed_against_the_present_champion(stages: Path) -> None:
    registry.register(evaluated(0.5), CONFIG)
    with pytest.raises(PromotionError, match="not compared by the gate yet"):
        promotion.promote()


def test_a_champion_that_cannot_be_evaluated_again_holds_the_challenger_back(stages: Path) -> None:
    """The contract has changed, and this project has no data to evaluate the champion on."""
    released(0.5)
    record = Record.read(paths.EVALUATION)
    record.contract["prompts"] = "others"
    for file in paths.EVALUATION.glob("[ro]*"):
        file.unlink()
    record.write(paths.EVALUATION)
    registry.register(evaluated(0.9), CONFIG)
    verdict = promotion.gate(CONFIG)
    assert not verdict.passed
    assert "could not be evaluated again" in verdict.to_markdown() and "composition cannot be compared" in str(verdict)


def test_an_evaluation_of_the_champion_by_another_contract_is_not_kept(stages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version is gated while the data are others; once they are back, the champion is evaluated on them."""
    champion = released(0.5)
    record = Record.read(paths.EVALUATION)
    record.contract["prompts"] = "others"
    for file in paths.EVALUATION.glob("[ro]*"):
        file.unlink()
    record.write(paths.EVALUATION)
    challenger = registry.register(evaluated(0.9), CONFIG)
    present, evaluations = Record.read(paths.EVALUATION), []

    def evaluate(version: registry.Version, config: object, output: Path) -> Record:
        evaluations.append(version.number)
        present.write(output)
        return present

    monkeypatch.setattr(promotion, "evaluate_version", evaluate)
    present.contract["image_path"] = "fit_square to 128 px"  # the champion's images have another size
    for prompts, kept in (("meanwhile", False), ("others", True), ("others", True)):
        present.contract["prompts"] = prompts
        promotion.gate(CONFIG, number=challenger.number)
        assert champion.run_id
        assert bool(registry.connect().list_artifacts(champion.run_id, "evaluations")) == kept
    assert evaluations == ["1", "1"]
