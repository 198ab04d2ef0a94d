"""The shapes source: rows, uniqueness, edits, condition maps."""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cm3leon.config.ingest_schema import ShapesConfig
from cm3leon.scenes import source
from cm3leon.scenes.composition import check, combinations, content, parse_caption
from cm3leon.scenes.reading import read_scene
from cm3leon.scenes.scene import Scene
from cm3leon.scenes.source import NEW_COMBINATIONS, rows
from cm3leon.sequence.tasks import CONDITIONS

CONFIG = ShapesConfig(count=200, letters=0.1, edits=0.3, conditions=0.2)
ROWS = list(rows(CONFIG, Path()))


def decode(data: bytes | None) -> np.ndarray:
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(data)))


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    again = list(rows(CONFIG, Path("elsewhere")))
    assert [asdict(row) for row in again] == [asdict(row) for row in ROWS]
    other = list(rows(CONFIG.model_copy(update={"seed": 1}), Path()))
    assert len({row.image for row in other} & {row.image for row in ROWS}) < 0.05 * len(ROWS)


def test_a_longer_run_starts_with_the_shorter_one() -> None:
    shorter = list(rows(CONFIG.model_copy(update={"count": 20}), Path()))
    assert [asdict(row) for row in shorter] == [asdict(row) for row in ROWS[: len(shorter)]]


@pytest.mark.parametrize("grid", [0, 8, 16])
def test_no_two_images_are_the_same(grid: int) -> None:
    config = ShapesConfig(count=800, max_objects=1 if grid == 8 else 3, grid=grid, size=32, edits=0.1, conditions=0)
    digests = [hashlib.sha256(row.image or b"").digest() for row in rows(config, Path())]
    assert len(digests) > config.count
    assert len(set(digests)) == len(digests)


def test_too_few_different_scenes_are_an_error_that_says_what_to_change() -> None:
    with pytest.raises(ValueError, match="lower count, or raise max_objects or grid"):
        list(rows(ShapesConfig(count=20_000, max_objects=1, grid=3, size=32, letters=0, edits=0, conditions=0), Path()))


def test_rows_are_complete() -> None:
    keys = [row.key for row in ROWS]
    assert len(set(keys)) == len(keys)
    for row in ROWS:
        assert (row.licence, row.attribution, row.source, row.problem) == ("CC0-1.0", "cm3leon shapes", "shapes", None)
        pixels = decode(row.image)
        assert pixels.shape == (CONFIG.size, CONFIG.size, 3)
        assert row.long_caption
        assert row.questions
        for label, (x0, y0, x1, y1) in row.objects:
            assert 0 <= x0 < x1 <= CONFIG.size
            assert 0 <= y0 < y1 <= CONFIG.size
            inside = pixels[round(y0) : round(y1), round(x0) : round(x1)].reshape(-1, 3)
            assert len(np.unique(inside, axis=0)) > 1, label


def test_captions_are_true_of_the_stored_image() -> None:
    for row in ROWS:
        scene = read_scene(decode(row.image))
        for text in row.captions:
            statement = parse_caption(text)
            assert statement is not None
            assert all(check(statement, scene).values()), (row.key, text)
        assert row.text_in_image == scene.letter


def test_edited_rows_follow_their_instruction_and_change_nothing_else() -> None:
    by_key = {row.key: row for row in ROWS}
    edited = [row for row in ROWS if row.edited_from]
    assert 0.2 * CONFIG.count < len(edited) < 0.4 * CONFIG.count
    kinds = set()
    for row in edited:
        assert row.instruction is not None
        original = by_key[row.edited_from or ""]
        assert row.group == original.group == original.key
        before, after = read_scene(decode(original.image)), read_scene(decode(row.image))
        kinds.add(_follows(row.instruction, before, after))
    assert kinds == {"background", "add", "remove", "color", "size"}
    assert all(row.group is None for row in ROWS if not row.edited_from and row.key not in {e.edited_from for e in edited})


def _follows(instruction: str, before: Scene, after: Scene) -> str:
    """Assert that the instruction was followed and nothing else changed; returns the kind of edit."""
    old, new = sorted(o.label for o in before.objects), sorted(o.label for o in after.objects)
    words = instruction.split()
    if instruction.startswith("change the background"):
        assert (after.background, new) == (words[-1], old)
        return "background"
    assert before.background == after.background
    removed, added = [label for label in old if label not in new], [label for label in new if label not in old]
    if words[0] == "add":
        assert removed == []
        assert added == [" ".join(words[2:])]
        return "add"
    if words[0] == "remove":
        assert added == []
        assert len(removed) == 1
        assert removed[0].endswith(words[-1])
        return "remove"
    assert words[0] == "make"
    assert len(removed) == len(added) > 0
    assert all(words[-1] in label.split() for label in added)
    return "size" if words[-1] in ("small", "large") else "color"


def test_frequency_of_letters_and_conditions() -> None:
    assert 0.05 < np.mean([row.text_in_image is not None for row in ROWS]) < 0.16
    assert 0.13 < np.mean([bool(row.conditions) for row in ROWS]) < 0.28
    for row in ROWS:
        if row.conditions:
            assert row.conditions.keys() == set(CONDITIONS)
            assert all(decode(data).shape == (CONFIG.size, CONFIG.size, 3) for data in row.conditions.values())


def test_what_captions_of_val_and_test_say_is_never_said_in_training() -> None:
    config = ShapesConfig(count=1500, edits=0.4, val_fraction=0.1, test_fraction=0.2)
    found = list(rows(config, Path()))
    said = {name: set[object]() for name in ("train", "val", "test")}
    for row in found:
        contents = {content(statement) for caption in row.captions if (statement := parse_caption(caption))}
        assert len(contents) == 1 and None not in contents  # every caption states all of it
        said[row.split] |= contents
    scenes = [row for row in found if row.edited_from is None]
    shares = {name: sum(row.split == name for row in scenes) / len(scenes) for name in said}
    assert abs(shares["val"] - 0.1) < 0.04 and abs(shares["test"] - 0.2) < 0.05
    # An edit of a held-out scene may show what training shows; no other row may.
    for name in ("val", "test"):
        own = {content(parse_caption(row.captions[0])) for row in scenes if row.split == name}
        assert not own & said["train"]
    assert not {content(parse_caption(row.captions[0])) for row in scenes if row.split == "val"} & said["test"]
    splits = {row.key: row.split for row in found}
    assert all(row.split == splits[row.edited_from] for row in found if row.edited_from)


def test_only_captions_of_train_prefer_one_order_of_their_objects() -> None:
    config = ShapesConfig(count=1000, edits=0, conditions=0, val_fraction=0.2, test_fraction=0.3, size=32)
    stated: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for row in rows(config, Path()):
        stated[row.split] += [how for text in row.captions if (statement := parse_caption(text)) and (how := statement.relation)]
    first = {split: sum(how in ("left of", "above") for how in found) / len(found) for split, found in stated.items()}
    assert first["train"] > 0.8
    assert all(0.4 < first[split] < 0.6 for split in ("val", "test"))


def test_new_combinations_are_shown_only_by_scenes_of_test_that_are_made_for_them() -> None:
    config = ShapesConfig(count=700, edits=0.4, letters=0, new_combinations=0.1)
    named = {name: set[tuple[str, ...]]() for name in ("train", "val", "test")}
    count = 0
    for row in rows(config, Path()):
        found = read_scene(decode(row.image)).combinations
        assert {pair for caption in row.captions if (said := parse_caption(caption)) for pair in combinations(said)} <= found
        named[row.split] |= found
        if found & NEW_COMBINATIONS:
            count += 1
            assert row.split == "test" and row.edited_from is None
    assert 0.07 * config.count < count < 0.13 * config.count
    assert named["test"] >= NEW_COMBINATIONS and not (named["train"] | named["val"]) & NEW_COMBINATIONS


def test_without_new_combinations_every_one_is_in_training() -> None:
    config = ShapesConfig(count=700, edits=0, letters=0, new_combinations=0)
    shown = {pair for row in rows(config, Path()) if row.split == "train" for pair in read_scene(decode(row.image)).combinations}
    assert shown >= NEW_COMBINATIONS


def test_worker_processes_paint_the_same_rows_in_the_same_order(monkeypatch):
    config = ShapesConfig(count=40, letters=0.1, edits=0.5, conditions=0.3)
    alone = list(rows(config, Path()))
    monkeypatch.setattr(source, "MIN_SHARED", 40)
    assert list(rows(config, Path())) == alone
    assert [plan.key for plan in source.sample_plans(config)] == [row.key for row in alone]
