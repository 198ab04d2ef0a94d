"""The gate's decision is a pure function of two records and the configuration."""

import numpy as np
import pytest

from cm3leon.config.profiles import load_profile, profile_names
from cm3leon.config.schema import GateConfig
from cm3leon.evaluation.calibration import lower_is_better
from cm3leon.evaluation.record import Record
from cm3leon.registry.gate import compare

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
    result = verdict(record(), record(), GateConfig(floors={}, margins={"vqa_accuracy": 0.1, "composition": 0.1}))
    assert result.passed and "neither record" in result.to_markdown()
    assert failed(verdict(record(), record(), GateConfig(floors={"cider": 1.0}, margins={"cider": 0.1}))) == {("cider", "floor")}


def test_a_margin_does_not_apply_to_a_score_that_the_champion_lacks():
    config = GateConfig(floors={}, margins={"cider": 0.1, "composition": 0.1})
    result = verdict(record(cider=1.0), record(), config)
    assert result.passed
    assert [row.passed for row in result.rows if row.metric == "cider"] == [None]


def test_after_a_change_of_contract_the_challenger_is_held_back_and_the_champions_scores_are_shown():
    changed = verdict(record(0.9, 1.0, {**CONTRACT, "prompts": "2"}), record())
    assert not changed.passed
    assert "evaluated differently (prompts)" in str(changed)
    text = changed.to_markdown()
    assert "| composition | 0.9 | (0.5) |" in text and "In parentheses" in text


def test_a_challenger_of_which_nothing_can_be_compared_is_held_back():
    """Every check passes, because there is none: before, that was a promotion."""
    result = verdict(record(), record(), GateConfig(floors={}, margins={}))
    assert not result.passed
    assert "nothing could be compared" in str(result)
    assert verdict(record(), None, GateConfig(floors={}, margins={})).passed
    assert compare(GateConfig(floors={}, margins={}), ("2", record()), ("2", record())).passed


def asked(values, name="cider", **fields):
    found = record(**fields)
    found.add(name, {f"r{number}": float(value) for number, value in enumerate(values)}, 100, 0)
    return found


PAIRS_GATE = GateConfig(floors={}, margins={"cider": 0.05})


def test_scores_that_are_means_are_compared_by_pairs():
    """Prompts differ much more than the models: of unpaired scores nothing could be said, of pairs it is certain."""
    rng = np.random.default_rng(0)
    difficulty, noise = rng.normal(5, 2, size=200), rng.normal(0, 0.1, size=200)
    worse = verdict(asked(difficulty - 0.1 + noise), asked(difficulty), PAIRS_GATE)
    [row] = [row for row in worse.rows if row.metric == "cider"]
    assert not worse.passed and row.pairs == 200
    assert row.difference == pytest.approx(-0.1, abs=0.03) and row.risk > 0.99
    assert row.interval[0] < -0.1 < row.interval[1] < -0.05
    assert verdict(asked(difficulty - 0.02 + noise), asked(difficulty), PAIRS_GATE).passed
    assert f"{row.interval[0]:+.3g}" in worse.to_markdown()


def test_the_risk_that_is_tolerated_is_a_parameter():
    """A drop of one margin is as likely more as less than a margin."""
    values = [0.0] * 100 + [1.0] * 100
    new = asked([0.0] * 10 + values[10:100] + [1.0] * 90 + [0.0] * 10)
    risks = [row.risk for row in verdict(new, asked(values), PAIRS_GATE).rows if row.metric == "cider"]
    assert 0.35 < risks[0] < 0.65
    strict, lax = (PAIRS_GATE.model_copy(update={"max_risk": risk}) for risk in (0.05, 0.95))
    assert not verdict(new, asked(values), strict).passed
    assert verdict(new, asked(values), lax).passed


def test_other_decoding_settings_are_another_model_and_not_another_contract(tmp_path):
    """Evaluated as earlier versions did, with the settings in the contract, a worse challenger was exempt from all margins."""
    new, old = asked([2.7] * 20), asked([4.8] * 20)
    for name, found, candidates in (("new", new, 8), ("old", old, 1)):
        found.contract = {**CONTRACT, "decoding": {"candidates": candidates}}
        found.write(tmp_path / name)
    result = verdict(Record.read(tmp_path / "new"), Record.read(tmp_path / "old"), PAIRS_GATE)
    assert failed(result) == {("cider", "margin")}


def test_records_that_the_champion_has_seen_in_training_are_left_out():
    old = asked([1.0] * 10 + [0.0] * 10)
    new = asked([0.0] * 10 + [0.5] * 10)
    assert not verdict(new, old, PAIRS_GATE).passed
    old.seen = [f"r{number}" for number in range(10)]
    unseen = verdict(new, old, PAIRS_GATE)
    assert unseen.passed and "seen 10 test records" in str(unseen)
    [row] = [row for row in unseen.rows if row.metric == "cider"]
    assert row.pairs == 10 and row.difference == 0.5
    # A distance has no outcomes, so it cannot be had without those records.
    distances = verdict(new, old, GateConfig(floors={}, margins={"cider": 0.05, "fd_encoder": 0.5}))
    assert not distances.passed and "fd_encoder cannot be compared" in str(distances)


def test_every_profile_compares_every_headline_score_by_default():
    for profile in profile_names():
        assert load_profile(profile).gate.margins.keys() >= {
            "composition", "vqa_accuracy", "cider", "clip_score", "layout/iou", "edit/done_and_kept", "condition/agreement",
            "reasoning/accuracy", "long_caption/cider", "infill/composition", "super_resolution_psnr_y",
        }  # fmt: skip


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
    assert bool(result.refusals) == (len(compared) < len(TASKS_GATE.margins))  # what cannot be compared holds it back
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
    assert "too low" in text
    assert text.count("\n| ") == len(result.rows) + 1


def test_direction_of_scores():
    assert all(lower_is_better(name) for name in ("fd_encoder", "kd_inception"))
    assert not any(lower_is_better(name) for name in ("composition", "cider", "clip_score", "vqa_accuracy"))
