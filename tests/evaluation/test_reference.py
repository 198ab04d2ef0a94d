"""Fresh runs: which count together, what their median and range are, and when a run is worse than all of them."""

from dataclasses import replace
from pathlib import Path

import pytest
from results_support import fresh_run

from cm3leon.config.loading import parse_config
from cm3leon.config.schema import Config
from cm3leon.evaluation.record import Record
from cm3leon.evaluation.reference import (
    comparable,
    compare,
    evaluation_digest,
    main_scores,
    parameters_digest,
    read_runs,
    spread,
    with_run,
    write_runs,
)
from cm3leon.utils.errors import UserError


def test_the_digest_leaves_out_the_seed_and_what_changes_no_score() -> None:
    same = [{"seed": 3}, {"launch": {"processes": 2}}, {"gate": {"max_risk": 0.1}}, {"drift": {"max_lost": 0.5}}]
    others = [
        {"pretrain": {"steps": 7}},
        {"evaluate": {"prompts": 7}},
        {"decoding": {"guidance": 9.0}},
        {"ingest": {"shapes": {"seed": 1}}},
    ]
    plain = parameters_digest(Config())
    assert {parameters_digest(parse_config(changes, "here")) for changes in same} == {plain}
    assert len({plain, *(parameters_digest(parse_config(changes, "here")) for changes in others)}) == len(others) + 1


def test_the_digest_of_the_evaluation_leaves_out_the_networks_that_measure() -> None:
    asked = {"prompts": "1", "seed": 0, "features": "image tower a"}
    digests = [evaluation_digest(Record(contract=asked | change)) for change in ({}, {"features": "b"}, {"prompts": "2"})]
    assert digests[0] == digests[1] != digests[2]


def test_runs_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert read_runs(file) == []
    runs = [fresh_run(0), fresh_run(1, minutes=None, seconds={}, peak_megabytes=None)]
    write_runs(file, runs)
    assert read_runs(file) == runs and list(tmp_path.iterdir()) == [file]
    file.write_text("<<<<<<< HEAD\n" + file.read_text())
    with pytest.raises(UserError, match=r"results\.json is not what"):
        read_runs(file)


def test_a_new_run_replaces_that_of_its_origin_and_those_of_other_parameters() -> None:
    new = fresh_run(1, scores={"composition": 0.9})
    assert with_run([fresh_run(0), fresh_run(1)], new) == [fresh_run(0), new]
    for elsewhere in (fresh_run(1, threads=new.threads + 1), fresh_run(1, processor="another")):
        assert with_run([fresh_run(0), fresh_run(1)], elsewhere) == [fresh_run(0), fresh_run(1), elsewhere]
    other = fresh_run(0, parameters="other")
    assert with_run([fresh_run(0), fresh_run(1)], other) == [other]


def test_runs_count_that_were_asked_the_same_as_the_newest() -> None:
    old = [replace(fresh_run(seed), evaluation="old", date=f"2026-01-0{seed + 1}") for seed in range(3)]
    new = [fresh_run(4), fresh_run(3)]
    assert comparable([*new, *old]) == [fresh_run(3), fresh_run(4)]
    assert comparable([]) == []


def test_the_worst_of_a_distance_is_the_highest() -> None:
    up, down = spread("composition", [0.7, 0.5, 0.9]), spread("fd_encoder", [0.7, 0.5, 0.9])
    assert (up.median, up.worst, up.best, up.count) == (0.7, 0.5, 0.9, 3)
    assert (down.median, down.worst, down.best, down.count) == (0.7, 0.9, 0.5, 3)
    assert [up.is_worse(value) for value in (0.4, 0.5, 0.8, 1.0)] == [True, False, False, False]
    assert [down.is_worse(value) for value in (0.4, 0.5, 0.9, 1.0)] == [False, False, False, True]
    one = spread("composition", [0.5])
    assert one.is_worse(0.4) and not one.is_worse(0.5) and not one.is_worse(0.6)
    distance = spread("fd_encoder", [0.5])
    assert distance.is_worse(0.6) and not distance.is_worse(0.4)


def test_variants_of_main_scores_are_shown_and_breakdowns_are_not() -> None:
    names = ["vqa_accuracy/is", "vqa_accuracy", "composition_of_anything_new", "composition/color", "composition", "bleu_4"]
    assert main_scores(names) == ["composition", "composition_of_anything_new", "vqa_accuracy"]


def test_a_run_is_compared_if_it_has_the_parameters_and_was_asked_the_same(tmp_path: Path) -> None:
    config, record = Config(seed=9), Record({"composition": 0.4, "vqa_accuracy": 0.8, "unknown": 1.0}, contract={"prompts": "1"})
    record.write(tmp_path)
    kind = {"parameters": parameters_digest(config), "evaluation": evaluation_digest(record)}
    file = tmp_path / "results.json"
    write_runs(file, [fresh_run(seed, **kind) for seed in range(3)])
    found = compare(config, tmp_path, file)
    assert found.count == 3 and found.seconds == {"ingest": 31.0, "sft": 601.0}
    assert {name: (score, known.median, known.is_worse(score)) for name, (score, known) in found.scores.items()} == {
        "composition": (0.4, 0.71, True), "vqa_accuracy": (0.8, 0.8, False),
    }  # fmt: skip
    assert compare(config, None, file).scores == {} and compare(config, tmp_path / "none", file).seconds
    assert compare(Config(pretrain={"steps": 1}), tmp_path, file).count == 0
    Record({"composition": 0.4}, contract={"prompts": "2"}).write(tmp_path)
    assert compare(config, tmp_path, file).scores == {}
