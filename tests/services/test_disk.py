"""What a run will write is estimated from its parameters, and a run that does not fit is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from cm3leon.config.profiles import load_profile
from cm3leon.services.disk import DiskFullError, check_disk, estimate, readable, tree_size
from cm3leon.training.checkpoint_runs import RunRecord
from cm3leon.training.planning import make_plan

ROOT = Path(__file__).parents[2]


def load(profile: str, *changes: str):
    return load_profile(profile, changes, ROOT / "configs")


@pytest.mark.parametrize("profile", ["tiny", "small", "cm3leon-350m", "cm3leon-7b"])
def test_checkpoints_and_weights_are_as_large_as_the_planner_counts_them(profile: str) -> None:
    config = load(profile)
    plan = make_plan(config, gpus=1)
    kept = min(config.pretrain.keep_checkpoints + 2, 2 if profile == "tiny" else 100)  # tiny validates twice, and saves then
    exact = kept * plan.checkpoint_bytes + 2 * 4 * plan.parameters.total
    assert estimate(config)["pretrain"] == pytest.approx(exact, rel=0.1)


def test_a_collection_counts_with_its_files(tmp_path: Path) -> None:
    config = load("tiny", "ingest.source=folder", f"ingest.path={tmp_path}")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "image.png").write_bytes(bytes(3_000_000))
    assert tree_size(tmp_path) == 3_000_000
    before = estimate(config)["ingest"]
    shutil.copy(tmp_path / "deep" / "image.png", tmp_path / "other.png")
    assert (before, estimate(config)["ingest"]) == (6_000_000, 12_000_000)  # in the working tree and in DVC's cache


def test_a_run_that_does_not_fit_is_refused_with_numbers_and_what_to_do(tmp_path: Path) -> None:
    huge = load("tiny", "pretrain.model.layers=1000000000")
    needed = readable(estimate(huge)["pretrain"])
    with pytest.raises(DiskFullError, match=rf"pretrain {needed}.*; .* are free on the disk of {tmp_path}; make room by cm3leon gc"):
        check_disk(huge, ["pretrain"], tmp_path)
    assert "writes nothing" in check_disk(huge, [], tmp_path)  # all is up to date
    assert "register" in check_disk(load("tiny"), ["evaluate"], tmp_path)


def test_checkpoints_that_the_next_run_removes_or_replaces_make_room(tmp_path: Path) -> None:
    config = load("tiny")
    outputs = 2 * 4 * make_plan(config, gpus=1).parameters.total
    written = estimate(config)["pretrain"]
    quarter = (written - outputs) / 4
    for age, (name, finished) in enumerate({"new": False, "finished": True, "old": False, "older": False}.items()):
        run = tmp_path / "models/checkpoints/pretrain" / name
        run.mkdir(parents=True)
        RunRecord({"of": name}, finished).write(run)
        (run / "step-5").write_bytes(bytes(round(quarter)))
        os.utime(run, (1000 - age, 1000 - age))
    assert f"pretrain {readable(written - 2 * quarter)}" in check_disk(config, ["pretrain"], tmp_path)
    (run.with_name("finished") / "step-6").write_bytes(bytes(round(written)))  # outputs are written all the same
    assert f"pretrain {readable(outputs)}" in check_disk(config, ["pretrain"], tmp_path)
    (run.with_name("new") / "run.json").write_text("cut o")  # as an unfinished run
    assert f"pretrain {readable(outputs)}" in check_disk(config, ["pretrain"], tmp_path)


@pytest.mark.parametrize(("size", "text"), [(900, "1 kB"), (1_500_000, "1.5 MB"), (2.5e9, "2.5 GB"), (1.25e13, "12.5 TB")])
def test_sizes_are_in_decimal_units(size: float, text: str) -> None:
    assert readable(size) == text
