"""The gate's decision is a pure function of two records and the configuration."""

import pytest

from cm3leon.config.schema import GateConfig
from cm3leon.evaluation.record import Record
from cm3leon.registry.gate import compare, lower_is_better

CONTRACT = {"prompts": "1", "seed": 0}
GATE = GateConfig(floors={"composition": 0.4}, ceilings={"fd_encoder": 9.0}, margins={"composition": 0.02, "fd_encoder": 0.5})


def record(composition=0.5, fd_encoder=3.0, contract=CONTRACT, **scores):
    return Record({"composition": composition, "fd_encoder": fd_encoder, **scores}, {}, {}, contract)


def verdict(new, old=None, config=GATE, **options):
    return compare(config, ("2", new), ("1", old) if old else None, **options)


def failed(result):
    return {(row.metric, row.check.split()[0]) for row in result.rows if row.passed is False}


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (record(0.6, 2.0), set()),
        (record(), set()),
        (record(0.48, 3.5), set()),
        (record(0.47, 3.0), {("composition", "margin")}),
        (record(0.5, 3.6), {("fd_encoder", "margin")}),
        (record(0.3, 12.0), {("composition", "floor"), ("composition", "margin"), ("fd_encoder", "ceiling"), ("fd_encoder", "margin")}),
    ],
    ids=["better", "equal", "worse within the margin", "worse past the margin", "lower is better, past the margin", "all checks fail"],
)
def test_against_a_champion(new, expected):
    result = verdict(new, record())
    assert failed(result) == expected
    assert result.passed == (not expected)


def test_without_a_champion_floors_and_ceilings_decide():
    assert verdict(record()).passed
    assert failed(verdict(record(0.3))) == {("composition", "floor")}
    assert failed(verdict(record(fd_encoder=9.5))) == {("fd_encoder", "ceiling")}


def test_a_missing_score_fails_its_checks():
    config = GateConfig(floors={"cider": 1.0}, margins={"vqa_accuracy": 0.1})
    assert failed(verdict(record(), record(vqa_accuracy=0.5), config)) == {("cider", "floor"), ("vqa_accuracy", "margin")}


def test_a_margin_does_not_apply_to_a_score_that_neither_record_has():
    result = verdict(record(), record(), GateConfig(floors={}, margins={"vqa_accuracy": 0.1}))
    assert result.passed and "neither record" in result.to_markdown()
    assert failed(verdict(record(), record(), GateConfig(floors={"cider": 1.0}, margins={"cider": 0.1}))) == {("cider", "floor")}


def test_a_margin_does_not_apply_to_a_score_that_the_champion_lacks():
    config = GateConfig(floors={}, margins={"cider": 0.1})
    result = verdict(record(cider=1.0), record(), config)
    assert result.passed
    assert [row.passed for row in result.rows if row.metric == "cider"] == [None]


def test_after_a_change_of_contract_floors_decide_or_the_challenger_is_held_back():
    new = record(0.42, 8.0, {**CONTRACT, "prompts": "2"})
    floors = verdict(new, record())
    assert floors.passed
    assert "prompts" in str(floors)
    assert not verdict(record(0.3, 3.0, {**CONTRACT, "prompts": "2"}), record()).passed
    refused = verdict(new, record(), GATE.model_copy(update={"on_contract_change": "refuse"}))
    assert not refused.passed
    assert "prompts" in str(refused)
    assert verdict(new, None, GATE.model_copy(update={"on_contract_change": "refuse"})).passed


TUNED = {"edit": {"asked": "e", "count": 3}, "layout_to_image": {"asked": "l", "count": 3}}
TASKS_GATE = GateConfig(floors={}, margins={"composition": 0.02, "edit/done": 0.1, "layout/iou": 0.1, "clip_score": 0.1, "fd_encoder": 0.5})


def test_a_lost_task_fails_its_margin_and_the_other_margins_apply():
    old = record(contract={**CONTRACT, "tasks": TUNED}, **{"edit/done": 0.6, "layout/iou": 0.5})
    lost = record(0.3, contract={**CONTRACT, "tasks": {"layout_to_image": TUNED["layout_to_image"]}}, **{"layout/iou": 0.5})
    assert failed(verdict(lost, old, TASKS_GATE)) == {("edit/done", "margin"), ("composition", "margin")}
    gained = record(contract={**CONTRACT, "tasks": TUNED}, **{"edit/done": 0.6, "layout/iou": 0.5})
    assert verdict(gained, record(), TASKS_GATE).passed


@pytest.mark.parametrize(
    ("change", "compared"),
    [
        ({"tasks": TUNED | {"edit": {"asked": "other", "count": 3}}}, {"clip_score", "composition", "fd_encoder", "layout/iou"}),
        ({"features": "other"}, {"composition", "edit/done", "layout/iou"}),
        ({"inception": "other"}, {"clip_score", "composition", "edit/done", "fd_encoder", "layout/iou"}),
        ({"seed": 1}, set()),
    ],
)
def test_a_changed_entry_of_the_contract_exempts_only_the_scores_it_concerns(change, compared):
    scores = {"edit/done": 0.6, "layout/iou": 0.5, "clip_score": 0.9}
    worse = dict.fromkeys(scores, 0.1)
    contract = {**CONTRACT, "tasks": TUNED, "features": "f", "inception": None}
    result = verdict(record(0.1, 9.0, contract | change, **worse), record(contract=contract, **scores), TASKS_GATE)
    assert failed(result) == {(name, "margin") for name in compared}
    assert next(iter(change)) in str(result.notes)
    assert not any("has no such score" in row.reason for row in result.rows)  # a score that is not comparable is not reported as missing


def test_a_refusal_holds_the_challenger_back_whatever_its_scores():
    result = verdict(record(0.9, 1.0), record(), refusals=["it was rolled back"])
    assert not result.passed
    assert "it was rolled back" in str(result)
    assert "it was rolled back" in result.to_markdown()


def test_the_table_has_a_row_for_every_score_and_check():
    result = verdict(record(0.3, cider=1.0), record())
    text = result.to_markdown()
    assert "held back" in text
    assert "| cider | 1 |" in text
    assert "below the floor" in text
    assert text.count("\n| ") == len(result.rows) + 1


def test_direction_of_scores():
    assert all(lower_is_better(name) for name in ("fd_encoder", "kd_inception"))
    assert not any(lower_is_better(name) for name in ("composition", "cider", "clip_score", "vqa_accuracy"))
