"""Captions, questions and reasoning: all that they state is true of the scene."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from cm3leon.scenes.composition import parse_caption
from cm3leon.scenes.scene import COLORS, Scene, relation, sample_scene
from cm3leon.scenes.text import captions, in_reading_order, long_caption, plural, questions, reasoning, with_article

SCENES = [sample_scene(random.Random(i), 3, 16, 0.1) for i in range(600)]


def test_captions_parse_back_to_their_scene() -> None:
    kinds: Counter[str] = Counter()
    for i, scene in enumerate(SCENES):
        texts = captions(scene, random.Random(i))
        assert 1 <= len(texts) == len(set(texts)) <= 5
        for text in texts:
            statement = parse_caption(text)
            assert statement is not None, text
            assert statement.background == scene.background
            assert sorted((m.color, m.shape, m.letter) for m in statement.objects) == sorted(
                (o.color, o.shape, o.letter) for o in scene.objects
            )
            stated = [m.size for m in statement.objects]
            if any(stated):
                assert sorted((m.color, m.shape, m.size) for m in statement.objects) == sorted(
                    (o.color, o.shape, o.size) for o in scene.objects
                )
            if statement.relation:
                first, second = (next(o for o in scene.objects if (o.color, o.shape) == (m.color, m.shape)) for m in statement.objects)
                dx, dy = second.x - first.x, second.y - first.y
                assert {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[statement.relation] > 0
            kinds["relation"] += statement.relation is not None
            kinds["sized"] += any(stated)
            kinds["main phrasing"] += text.endswith(f"on a {scene.background} background")
            kinds["all"] += 1
    assert kinds["relation"] > 0.2 * kinds["all"]
    assert 0.35 < kinds["sized"] / kinds["all"] < 0.6
    assert kinds["main phrasing"] > 0.6 * kinds["all"]


def test_of_two_objects_in_reading_order_the_first_is_left_of_or_above_the_other() -> None:
    pairs = [scene.objects for scene in SCENES if len(scene.objects) == 2]
    found = {relation(*in_reading_order(objects)) for objects in (*pairs, *(pair[::-1] for pair in pairs))}
    assert found - {None} == {"left of", "above"}  # identical objects may have no clear relation


def test_captions_name_objects_in_reading_order_as_often_as_asked() -> None:
    for ordered, least, most in ((0.0, 0.45, 0.55), (0.75, 0.83, 0.92), (1.0, 1.0, 1.0)):
        said = [parse_caption(text) for i, scene in enumerate(SCENES) for text in captions(scene, random.Random(i), ordered)]
        stated = [statement.relation for statement in said if statement and statement.relation]
        assert least <= sum(how in ("left of", "above") for how in stated) / len(stated) <= most


def test_articles() -> None:
    assert with_article("orange ring") == "an orange ring"
    assert with_article("red ring") == "a red ring"


def test_long_caption_names_every_object_and_the_background() -> None:
    for scene in SCENES:
        text = long_caption(scene)
        assert f"background is {scene.background}" in text
        for item in scene.objects:
            assert (f"letter {item.letter} is drawn in {item.color}" if item.letter else item.label) in text
        for shape_a, side, shape_b in re.findall(r"the (\w+ \w+) is (left of|right of|above|below) the (\w+ \w+)", text, re.IGNORECASE):
            assert _side(scene, shape_b, side) >= {shape_a}


def _side(scene: Scene, target: str, relation: str) -> set[str]:
    """All objects that lie on that side of the target's center, as "COLOR SHAPE"."""
    axis, sign = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}[relation]
    center = next(getattr(o, axis) for o in scene.objects if f"{o.color} {o.shape}" == target)
    return {f"{o.color} {o.shape}" for o in scene.objects if sign * (getattr(o, axis) - center) > 0}


def _answers(scene: Scene, question: str) -> set[str]:
    """All true answers, found independently of how questions are made."""
    objects = scene.objects
    words = question.rstrip("?").split()
    if question == "How many objects are there?":
        return {str(len(objects))}
    if question == "What is the background color?":
        return {scene.background}
    if question == "Which letter is shown?":
        return {o.letter.lower() for o in objects if o.letter}
    if question.startswith("Is there"):
        return {_compared(scene, *words[-2:])}
    if found := re.fullmatch(r"What shape is the (\w+) object\?", question):
        return {with_article(f"{o.color} {o.shape}") for o in objects if o.color == found[1]}
    if found := re.fullmatch(r"What shape are the (\w+) objects\?", question):
        return {f"{o.color} {plural(o.shape)}" for o in objects if o.color == found[1]}
    if found := re.fullmatch(r"What (color|size) (is|are) the (\w+)\?", question):
        about = [o for o in objects if found[3] == (o.shape if found[2] == "is" else plural(o.shape))]
        return {f"the {found[3]} {found[2]} {getattr(o, found[1])}" for o in about}
    if found := re.fullmatch(r"What is (left of|right of|above|below) the (\w+ \w+)\?", question):
        return _side(scene, found[2], found[1])
    raise AssertionError(f"unknown question {question}")


def _compared(scene: Scene, color: str, shape: str) -> str:
    """The most similar object, compared with that of a color and a shape, and whether it is that one."""
    first = in_reading_order(scene.objects)
    same = [o for o in first if (o.color, o.shape) == (color, shape)]
    [item, *_] = same or [o for o in first if o.shape == shape] or [o for o in first if o.color == color] or first
    if same:
        return f"{color} {color} same, {shape} {shape} same, yes"
    verdicts = ["same" if item.color == color else "other", "same" if item.shape == shape else "other"]
    return f"{color} {item.color} {verdicts[0]}, {shape} {item.shape} {verdicts[1]}, no"


@pytest.mark.parametrize("every", [False, True])
def test_every_question_has_exactly_one_true_answer_which_is_the_given_one(every: bool) -> None:
    for i, scene in enumerate(SCENES):
        asked = questions(scene, random.Random(i), every)
        assert 3 <= len(asked) <= (14 if every else 8)
        assert len({question for question, _ in asked}) == len(asked)
        for question, answers in asked:
            assert _answers(scene, question) == set(answers), (scene, question)
            assert answers[0] == answers[0].lower()


def test_kinds_of_questions_are_mixed_and_yes_no_is_balanced() -> None:
    asked = [(q, a[0]) for i, scene in enumerate(SCENES) for q, a in questions(scene, random.Random(i))]
    kinds = Counter(" ".join(q.split()[:2]) for q, _ in asked)
    assert {"What color", "What shape", "How many", "What is", "What size", "Is there", "Which letter"} <= kinds.keys()
    yes_no = [a.split(", ")[-1] for q, a in asked if q.startswith("Is there")]
    assert 0.4 < yes_no.count("yes") / len(yes_no) < 0.6
    # Hard negatives: the color or the shape occurs in the scene, in another combination.
    hard = 0
    everything = [(s, q, a) for i, s in enumerate(SCENES) for q, a in questions(s, random.Random(i))]
    negatives = [(s, q) for s, q, a in everything if q.startswith("Is there") and a[0].endswith(", no")]
    for scene, question in negatives:
        color, shape = question.rstrip("?").split()[-2:]
        assert color in COLORS
        hard += any(color == o.color or shape == o.shape for o in scene.objects)
    assert hard > 0.6 * len(negatives)


def test_of_every_object_that_one_attribute_tells_from_the_others_the_attributes_are_asked() -> None:
    for i, scene in enumerate(SCENES):
        if scene.letter or scene.identical:
            continue
        answers = {question: answer for question, [answer] in questions(scene, random.Random(i), every=True)}
        for item in scene.objects:
            if sum(other.shape == item.shape for other in scene.objects) == 1:
                assert answers[f"What color is the {item.shape}?"].endswith(f" is {item.color}")
                assert answers[f"What size is the {item.shape}?"].endswith(f" is {item.size}")
            if sum(other.color == item.color for other in scene.objects) == 1:
                assert answers[f"What shape is the {item.color} object?"].endswith(f" {item.shape}")
        concluded = [answer.split(", ")[-1] for question, answer in answers.items() if question.startswith("Is there")]
        assert sorted(concluded) == ["no", "yes"]


def _concludes(scene: Scene, question: str) -> str:
    """The answer to a reasoning question, found from the objects."""
    shapes = [o.shape for o in scene.objects]
    if found := re.fullmatch(r"Are there more (\w+?)(?:(?<=ss)es|s) than (\w+?)(?:(?<=ss)es|s)\?", question):
        return "yes" if shapes.count(found[1]) > shapes.count(found[2]) else "no"
    if found := re.fullmatch(r"How many objects remain without the (\w+?)(?:(?<=ss)es|s)\?", question):
        return str(len(shapes) - shapes.count(found[1]))
    found = re.fullmatch(r"Which is (.+), the (\w+ \w+) or the (\w+ \w+)\?", question)
    assert found, question
    by_name = {f"{o.color} {o.shape}": o for o in scene.objects}
    worth = {
        "larger": lambda o: o.radius, "smaller": lambda o: -o.radius, "further left": lambda o: -o.x, "further right": lambda o: o.x,
        "higher": lambda o: -o.y, "lower": lambda o: o.y,
    }[found[1]]  # fmt: skip
    return max(found.groups()[1:], key=lambda name: worth(by_name[name]))


def test_answers_and_explanations_of_reasoning_are_true() -> None:
    kinds: Counter[str] = Counter()
    for i, scene in enumerate(SCENES):
        problems = reasoning(scene, random.Random(i))
        assert len(problems) == (0 if scene.letter else 1)
        for problem in problems:
            assert problem.answer in problem.options and problem.answer == _concludes(scene, problem.question), problem
            kinds[problem.question.split()[0]] += 1
            if "large" in problem.explanation:
                sizes = dict(re.findall(r"[Tt]he (\w+ \w+) is (large|small)", problem.explanation))
                assert sizes == {f"{o.color} {o.shape}": o.size for o in scene.objects if f"{o.color} {o.shape}" in sizes}
    assert min(kinds[word] for word in ("Are", "How", "Which")) > len(SCENES) / 10
