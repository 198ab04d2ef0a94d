"""Sources of questions: VQA v2, OK-VQA and VizWiz, and ScienceQA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cm3leon.config.ingest_schema import ScienceQAConfig, VqaConfig
from cm3leon.data.manifest import Problem
from cm3leon.data.sources import SourceError, scienceqa, vqa


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def answers(*texts: Any) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_confidence": "yes", "answer_id": number} for number, text in enumerate(texts, 1)]


def write_vqa(root: Path) -> None:
    asked = [(100, 9, "What is it?"), (101, 9, "Is it red?"), (200, 25, "Where?"), (201, 25, "Why?")]
    questions = [{"question_id": number, "image_id": image, "question": text} for number, image, text in asked]
    given = {100: answers("net", "a net", "net"), 101: answers("yes", " "), 200: answers("", "  ")}
    annotations = [
        {"question_id": number, "image_id": 0, "answers": found, "question_type": "x", "multiple_choice_answer": "net"}
        for number, found in given.items()
    ]
    write(root / "questions.json", {"info": {}, "task_type": "Open-Ended", "questions": questions})
    write(root / "annotations.json", {"info": {}, "annotations": annotations})
    (root / "images").mkdir()
    (root / "images/COCO_train2014_000000000009.jpg").write_bytes(b"nine")


def test_questions_and_answers_of_vqa_are_joined_and_those_without_answers_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_vqa(tmp_path)
    [row] = vqa.rows(VqaConfig(license="CC-BY-4.0"), tmp_path)
    assert (row.image, row.problem, row.captions, row.licence) == (b"nine", None, [], "CC-BY-4.0")
    assert row.questions == [("What is it?", ["net", "a net", "net"]), ("Is it red?", ["yes"])]
    assert row.origin == "questions.json image 9"
    assert f"{tmp_path / 'questions.json'}: 2 of 4 questions have no answer and are left out\n" == capsys.readouterr().out


def test_a_test_set_without_answers_is_refused(tmp_path: Path) -> None:
    write_vqa(tmp_path)
    write(tmp_path / "annotations.json", {"annotations": []})
    with pytest.raises(SourceError, match=r"none of 4 questions has an answer; those of test sets are not published"):
        list(vqa.rows(VqaConfig(), tmp_path))


def test_vizwiz_has_questions_and_answers_in_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/VizWiz_train_00000000.jpg").write_bytes(b"zero")
    content = [
        {"image": "VizWiz_train_00000000.jpg", "question": "What is this?", "answers": answers("basil", "basil leaves"), "answerable": 1},
        {"image": "VizWiz_test_00000001.jpg", "question": "And this?"},
        {"image": "VizWiz_train_00000002.jpg", "question": "What?", "answers": [{"answer_type": "other"}]},
    ]
    write(tmp_path / "train.json", content)
    config = VqaConfig(questions="train.json", annotations=None, images="images/{image_id}")
    found = list(vqa.rows(config, tmp_path))
    assert (found[0].image, found[0].questions, found[0].problem) == (b"zero", [("What is this?", ["basil", "basil leaves"])], None)
    assert found[1].problem == "missing,malformed_row"  # an answer without a text
    assert "1 of 3 questions have no answer" in capsys.readouterr().out
    with pytest.raises(SourceError, match=r"is a list, as VizWiz has it: set ingest\.vqa\.annotations to null"):
        list(vqa.rows(VqaConfig(questions="train.json"), tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("questions", {"annotations": []}, r"questions\.json has no list 'questions', as VQA v2 has it"),
        ("annotations", {"questions": []}, r"annotations\.json has no list 'annotations', as VQA v2 has it"),
        ("questions", {"questions": [{"question_id": 1, "question": "x"}]}, r"questions\.json: 'questions': entry 0 has no 'image_id'"),
        ("annotations", {"annotations": [{"question_id": 1}]}, r"annotations\.json: 'annotations': entry 0 has no 'answers'"),
        ("questions", None, r"questions\.json does not exist; ingest\.vqa\.questions names it, relative to ingest\.path"),
        ("annotations", None, r"annotations\.json does not exist; ingest\.vqa\.annotations names it"),
    ],
)
def test_wrong_files_of_vqa_are_told_by_what_is_missing(tmp_path: Path, file: str, content: Any, message: str) -> None:
    write_vqa(tmp_path)
    (tmp_path / f"{file}.json").unlink()
    if content is not None:
        write(tmp_path / f"{file}.json", content)
    with pytest.raises(SourceError, match=message):
        list(vqa.rows(VqaConfig(), tmp_path))


PROBLEM = {
    "question": "Which is north?", "choices": ["Maine", "Florida"], "answer": 0, "hint": "Look at the map.", "image": "image.png",
    "task": "closed choice", "grade": "grade2", "subject": "social science", "lecture": "Maps have directions.",
    "solution": "Maine is further north.", "split": "train",
}  # fmt: skip


def write_scienceqa(root: Path, **changes: dict[str, Any]) -> None:
    problems = {
        "1": PROBLEM,
        "2": {**PROBLEM, "question": "Which is south?", "answer": 1, "hint": "", "lecture": "", "split": "val"},  # the same picture
        "3": {**PROBLEM, "image": None},
        "4": {**PROBLEM, "lecture": "", "solution": " "},
        "5": {**PROBLEM, "answer": 7, "split": "test"},
    }
    write(root / "problems.json", {number: {**problem, **changes.get(number, {})} for number, problem in problems.items()})
    for place, content in (("train/1", b"map"), ("val/2", b"map"), ("test/5", b"other")):
        (root / "images" / place).mkdir(parents=True)
        (root / "images" / place / "image.png").write_bytes(content)


def test_problems_of_scienceqa_become_reasoning_about_their_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scienceqa(tmp_path)
    write(tmp_path / "captions.json", {"captions": {"1": "a map", "2": "a map of states"}})
    found = list(scienceqa.rows(ScienceQAConfig(captions="captions.json", license="MIT"), tmp_path))
    assert found[0].reasoning == [
        Problem("Which is north?", ["Maine", "Florida"], "Maine", "Maps have directions.\nMaine is further north.", "Look at the map."),
        Problem("Which is south?", ["Maine", "Florida"], "Florida", "Maine is further north."),
    ]
    assert (found[0].image, found[0].captions, found[0].problem) == (b"map", ["a map", "a map of states"], None)
    assert found[0].origin == "problems.json problem 1, 2"
    assert (found[1].image, found[1].problem) == (b"other", "malformed_row")  # there is no choice 7
    assert len(found) == 2
    told = "of 5 problems 1 have no image and 1 more neither lecture nor solution; they are left out"
    assert told in capsys.readouterr().out
    assert next(scienceqa.rows(ScienceQAConfig(license="MIT"), tmp_path)).captions == []


def test_wrong_files_of_scienceqa_are_told_by_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"problems\.json does not exist; ingest\.scienceqa\.problems names it"):
        list(scienceqa.rows(ScienceQAConfig(), tmp_path))
    write(tmp_path / "problems.json", {"1": {name: value for name, value in PROBLEM.items() if name not in ("choices", "split")}})
    with pytest.raises(SourceError, match="entry 0 has no 'split' and no 'choices'"):
        list(scienceqa.rows(ScienceQAConfig(), tmp_path))
    write(tmp_path / "problems.json", [PROBLEM])
    with pytest.raises(SourceError, match="is no map of a problem's number to the problem"):
        list(scienceqa.rows(ScienceQAConfig(), tmp_path))
    write(tmp_path / "problems.json", {"1": {**PROBLEM, "image": ""}})
    with pytest.raises(SourceError, match="none of 1 problems has an image and a lecture or solution"):
        list(scienceqa.rows(ScienceQAConfig(), tmp_path))
    write(tmp_path / "problems.json", {"1": PROBLEM})
    write(tmp_path / "captions.json", {"1": "a map"})
    with pytest.raises(SourceError, match=r"captions\.json has no map 'captions'"):
        list(scienceqa.rows(ScienceQAConfig(captions="captions.json"), tmp_path))
