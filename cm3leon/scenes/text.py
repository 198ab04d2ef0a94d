"""Texts about a scene: captions, a long caption, questions with answers, reasoning. All of them are true of the scene.

Captions are in American English, like those of COCO. They follow the grammar that ``cm3leon.scenes.composition.parse_caption`` parses.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

from cm3leon.data.manifest import Problem
from cm3leon.scenes.scene import COLORS, SHAPES, Object, Scene, relation

NUMBERS = {1: "one", 2: "two", 3: "three"}


def with_article(words: str) -> str:
    """``"orange ring"`` -> ``"an orange ring"``."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(shape: str) -> str:
    """``"cross"`` -> ``"crosses"``."""
    return shape + ("es" if shape.endswith("s") else "s")


def _name(item: Object, sized: bool) -> str:
    """``"a small red circle"``, without its size unless ``sized``."""
    return with_article(item.label if sized else f"{item.color} {item.shape}")


def in_reading_order(objects: Iterable[Object]) -> list[Object]:
    """Objects from the top left to the bottom right: of two with a spatial relation, that left of or above the other comes first."""
    # The axis along which centers are DOMINANCE (1.6) times further apart decides: 1.5 is less.
    return sorted(objects, key=lambda item: item.x + 1.5 * item.y)


def _subject(scene: Scene, rng: random.Random, ordered: float) -> str:
    """The objects of a scene as a noun phrase, with sizes in half of the cases; in reading order in a share ``ordered``, else in any."""
    objects, sized = list(scene.objects), rng.random() < 0.5
    if scene.letter:
        item = objects[0]
        return rng.choice([f"the letter {item.letter} in {item.color}", with_article(item.label)])
    if scene.identical:
        item = objects[0]
        return f"{NUMBERS[len(objects)]} {item.size + ' ' if sized else ''}{item.color} {plural(item.shape)}"
    rng.shuffle(objects)
    if rng.random() < ordered:
        objects = in_reading_order(objects)
    names = [_name(item, sized) for item in objects]
    if len(names) == 1:
        return names[0]
    if len(names) == 2:
        position = relation(objects[0], objects[1])
        return f"{names[0]} {position} {names[1]}" if position and rng.random() < 0.75 else f"{names[0]} and {names[1]}"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def caption(scene: Scene, rng: random.Random, ordered: float = 0.0) -> str:
    """Sample a short caption; 70 % end like ``"on a gray background"``.

    Args:
        ordered: share of the captions that name the objects in reading order; the others name them in random order.
    """
    subject, dice = _subject(scene, rng, ordered), rng.random()
    if dice < 0.7:
        return f"{subject} on a {scene.background} background"
    return f"{subject} on {scene.background}" if dice < 0.85 else f"a {scene.background} background with {subject}"


def captions(scene: Scene, rng: random.Random, ordered: float = 0.0) -> list[str]:
    """Five sampled captions without the duplicates among them, as COCO has five an image; ``ordered`` as of :func:`caption`."""
    sampled = [caption(scene, rng, ordered) for _ in range(5)]
    return list(dict.fromkeys(sampled))


def rough_position(item: Object) -> str:
    """The position of an object on a 3 x 3 grid: ``"at the top left"``, ``"in the center"``."""
    row = "top" if item.y < 0.38 else "bottom" if item.y > 0.62 else ""
    column = "left" if item.x < 0.38 else "right" if item.x > 0.62 else ""
    return f"at the {row} {column}".replace("  ", " ").strip() if row or column else "in the center"


def long_caption(scene: Scene) -> str:
    """A paragraph: background, number of objects, each with size, color, shape and rough position, and their spatial relations.

    Objects are named in reading order.
    """
    count, objects = len(scene.objects), in_reading_order(scene.objects)
    if scene.letter:
        item = scene.objects[0]
        return f"The background is {scene.background}. The letter {item.letter} is drawn in {item.color} {rough_position(item)}."
    items = [f"{with_article(item.label)} {rough_position(item)}" for item in objects]
    listed = items[0] if count == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
    sentences = [
        f"The background is {scene.background} with {NUMBERS[count]} {'object' if count == 1 else 'objects'} on it.",
        f"There is {listed}.",
    ]
    if not scene.identical:
        facts = [
            f"the {first.color} {first.shape} is {position} the {second.color} {second.shape}"
            for first, second in itertools.combinations(objects, 2)
            if (position := relation(first, second))
        ]
        if facts:
            joined = facts[0] if len(facts) == 1 else f"{', '.join(facts[:-1])} and {facts[-1]}"
            sentences.append(f"{joined[0].upper()}{joined[1:]}.")
    return " ".join(sentences)


def _existence(scene: Scene, rng: random.Random, there: bool) -> tuple[str, str]:
    """A question about the presence of an object that is ``there`` or is not.

    Most negatives are hard: in 80 % of them the color or the shape occurs in the scene, in another combination.
    """
    present = {(item.color, item.shape) for item in scene.objects}
    if there:
        color, shape = rng.choice(sorted(present))
        return _is_there(scene, color, shape)
    colors, shapes = sorted({c for c, _ in present}), sorted({s for _, s in present})
    # The kind of negative is fixed first; then combinations are sampled until one is absent.
    kind = rng.random()
    absent = None
    while absent is None or absent in present:
        color = rng.choice(colors) if kind < 0.4 else rng.choice(list(COLORS))
        shape = rng.choice(shapes) if 0.4 <= kind < 0.8 else rng.choice(list(SHAPES))
        absent = color, shape
    return _is_there(scene, *absent)


def _is_there(scene: Scene, color: str, shape: str) -> tuple[str, str]:
    """The question whether an object is there, with an answer like ``"red red same, circle square other, no"``.

    The answer compares what is asked for with the most similar object of the scene, by color and by shape, and then concludes. A small
    decoder does not learn a bare yes or no: to find an object is one step, to compare it with the one in question is another, and that is
    learned where the two words stand side by side.
    """
    # Of equally similar objects the first in reading order; a common shape makes two objects more similar than a common color.
    found = max(in_reading_order(scene.objects), key=lambda item: 2 * (item.shape == shape) + (item.color == color))
    pairs = [(color, found.color), (shape, found.shape)]
    compared = [f"{asked} {seen} {'same' if asked == seen else 'other'}" for asked, seen in pairs]
    answer = "yes" if all(asked == seen for asked, seen in pairs) else "no"
    return f"Is there {with_article(f'{color} {shape}')}?", ", ".join([*compared, answer])


def _relation_questions(scene: Scene) -> list[tuple[str, str]]:
    """Questions like ``"What is left of the blue square?"``, only where exactly one object lies on that side, so that none is ambiguous."""
    found: list[tuple[str, str]] = []
    if scene.identical:
        return found
    for target in scene.objects:
        others = [item for item in scene.objects if item is not target]
        sides = {
            "left of": [o for o in others if o.x < target.x], "right of": [o for o in others if o.x > target.x],
            "above": [o for o in others if o.y < target.y], "below": [o for o in others if o.y > target.y],
        }  # fmt: skip
        for position, there in sides.items():
            if len(there) == 1 and relation(there[0], target) == position:
                found.append((f"What is {position} the {target.color} {target.shape}?", f"{there[0].color} {there[0].shape}"))
    return found


def questions(scene: Scene, rng: random.Random, every: bool = False) -> list[tuple[str, list[str]]]:
    """Questions with their answers in lower case: one of each kind. Each has exactly one right answer.

    Args:
        every: ask for the color and the size of every object that its shape tells from the others, for the shape of every one that its
            color does, and for one object that is there and one that is not. A decoder that is asked about one object of each image learns
            to name any color that occurs.
    """
    background = ("What is the background color?", scene.background)
    if scene.letter:
        chosen = [
            ("Which letter is shown?", scene.letter.lower()),
            ("What color is the letter?", f"the letter is {scene.objects[0].color}"),
            background,
        ]
        return [(question, [answer]) for question, answer in chosen]
    # A list of questions for each kind; only attributes that identify an object uniquely are used to refer to it.
    kinds = [[("How many objects are there?", str(len(scene.objects)))], [background], _relation_questions(scene)]
    attributes = _attribute_questions(scene)
    if every:
        chosen = [*(rng.choice(kind) for kind in kinds if kind), *itertools.chain(*attributes)]
        chosen += [_existence(scene, rng, there=True), _existence(scene, rng, there=False)]
    else:
        chosen = [*(rng.choice(kind) for kind in [*kinds, *attributes] if kind), _existence(scene, rng, there=rng.random() < 0.5)]
    rng.shuffle(chosen)
    return [(question, [answer]) for question, answer in chosen]


def _attribute_questions(scene: Scene) -> list[list[tuple[str, str]]]:
    """Questions for the color, the size and the shape of objects, a list of each, with answers like ``"the cross is red"``.

    The answer first says what it is about. A small decoder finds what belongs to the word that it has just written; to find what belongs to
    a word of the question is a step more, which it often does not learn.
    """
    if scene.identical:
        item = scene.objects[0]
        many = plural(item.shape)
        return [
            [(f"What color are the {many}?", f"the {many} are {item.color}")],
            [(f"What size are the {many}?", f"the {many} are {item.size}")],
            [(f"What shape are the {item.color} objects?", f"{item.color} {many}")],
        ]
    shapes, colors = [item.shape for item in scene.objects], [item.color for item in scene.objects]
    one_shape = [item for item in scene.objects if shapes.count(item.shape) == 1]
    one_color = [item for item in scene.objects if colors.count(item.color) == 1]
    return [
        [(f"What color is the {item.shape}?", f"the {item.shape} is {item.color}") for item in one_shape],
        [(f"What size is the {item.shape}?", f"the {item.shape} is {item.size}") for item in one_shape],
        [(f"What shape is the {item.color} object?", with_article(f"{item.color} {item.shape}")) for item in one_color],
    ]


def reasoning(scene: Scene, rng: random.Random) -> list[Problem]:
    """A multiple-choice question that takes a step of reasoning, with options and explanation; empty for a letter scene."""
    # Larger and further compare two different objects. The other two always give a problem, so one is always found.
    if scene.letter:
        return []
    makers = [_more_or_less, _remaining] if scene.identical or len(scene.objects) == 1 else [_larger, _further, _more_or_less, _remaining]
    rng.shuffle(makers)
    return [next(problem for problem in (make(scene, rng) for make in makers) if problem)]


# Each of the functions below makes one kind of problem; None if the scene gives no such problem.


def _more_or_less(scene: Scene, rng: random.Random) -> Problem:
    shapes = sorted({item.shape for item in scene.objects})
    first = rng.choice(shapes)
    second = rng.choice([shape for shape in (shapes if len(shapes) > 1 and rng.random() < 0.7 else SHAPES) if shape != first] or ["ring"])
    one, other = (sum(item.shape == shape for item in scene.objects) for shape in (first, second))
    return Problem(
        f"Are there more {plural(first)} than {plural(second)}?",
        ["yes", "no"],
        "yes" if one > other else "no",
        f"There {_counted(one, first)} and {_counted(other, second, verb=False)}.",
        "Only whole shapes count.",
    )


def _counted(count: int, shape: str, verb: bool = True) -> str:
    """A count in words: ``"are two circles"``, or ``"two circles"`` without the verb."""
    number = {0: "no"}.get(count, NUMBERS.get(count, str(count)))
    words = f"{number} {shape if count == 1 else plural(shape)}"
    return f"{'is' if count == 1 else 'are'} {words}" if verb else words


def _remaining(scene: Scene, rng: random.Random) -> Problem:
    shape = rng.choice(sorted({item.shape for item in scene.objects}))
    whole, removed = len(scene.objects), sum(item.shape == shape for item in scene.objects)
    counted = [f"{NUMBERS[number]} {noun if number == 1 else plural(noun)}" for number, noun in ((whole, "object"), (removed, shape))]
    return Problem(
        f"How many objects remain without the {plural(shape)}?",
        [str(number) for number in range(4)],
        str(whole - removed),
        f"{counted[0].capitalize()} less {counted[1]} is {NUMBERS.get(whole - removed, 'none')}.",
        "Only whole shapes count.",
    )


def _larger(scene: Scene, rng: random.Random) -> Problem | None:
    pairs = [(a, b) for a in scene.objects for b in scene.objects if a.size == "large" and b.size == "small"]
    if not pairs:
        return None
    large, small = rng.choice(pairs)
    smaller = rng.random() < 0.5
    names = [f"{item.color} {item.shape}" for item in (large, small)]
    return Problem(
        f"Which is {'smaller' if smaller else 'larger'}, {_either(names, rng)}?",
        sorted(names),
        names[1] if smaller else names[0],
        f"The {names[0]} is large and the {names[1]} is small.",
        "Shapes are large or small.",
    )


def _further(scene: Scene, rng: random.Random) -> Problem | None:
    pairs = [(a, b, position) for a in scene.objects for b in scene.objects if a is not b and (position := relation(a, b))]
    if not pairs:
        return None
    first, second, position = rng.choice(pairs)
    names = [f"{item.color} {item.shape}" for item in (first, second)]
    way = {"left of": "further left", "right of": "further right", "above": "higher", "below": "lower"}[position]
    return Problem(
        f"Which is {way}, {_either(names, rng)}?",
        sorted(names),
        names[0],
        f"The {names[0]} is {position} the {names[1]}.",
        "Left is the viewer's left.",
    )


def _either(names: list[str], rng: random.Random) -> str:
    one, other = rng.sample(names, 2)
    return f"the {one} or the {other}"
