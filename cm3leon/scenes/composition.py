"""Composition accuracy: the fraction of prompts whose image has *every* attribute that the prompt states, 0 to 1.

:func:`parse_caption` turns a caption of the shapes source, or a user's own words within its vocabulary, into a :class:`Statement`;
``read_scene`` reads the image back into a scene; :func:`check` compares the two by attribute. The number of objects must match exactly:
an extra object is an error.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cm3leon.scenes.reading import read_scene
from cm3leon.scenes.scene import BACKGROUNDS, COLORS, LETTERS, SHAPES, SIZES, Combination, Content, Object, Scene, directed

ATTRIBUTES = ("background", "count", "color", "shape", "size", "relation", "text")
MOST_OBJECTS = 6
"""Objects that a caption may state, and objects of an image that are matched (all permutations are tried). With more objects the count of
an image is wrong anyway."""


@dataclass(frozen=True)
class Mention:
    """An object as a caption states it; None for what the caption leaves open. ``shape`` is ``"letter"`` for a letter."""

    shape: str
    color: str | None = None
    size: str | None = None
    letter: str | None = None


@dataclass(frozen=True)
class Statement:
    """The attributes that a caption states. ``relation`` is the spatial relation of the first object to the second."""

    objects: tuple[Mention, ...]
    background: str | None = None
    relation: str | None = None


def _any(words: Sequence[str]) -> str:
    return "|".join(words)


# The grammar, in lower case. Backgrounds come after the objects ("... on gray") or before them ("a gray background with ...").
_GROUND = _any(list(BACKGROUNDS))
_ON_BACKGROUND = re.compile(rf"(?P<subject>.+?),? (?:on|against|with) (?:(?:an?|the) )?(?P<ground>{_GROUND})(?: background)?")
_BACKGROUND_WITH = re.compile(rf"(?:on )?(?:(?:an?|the) )?(?P<ground>{_GROUND}) background(?: with|,) (?P<subject>.+)")
_RELATIONS = {
    "left of": r"(?:to |on )?(?:the )?left of", "right of": r"(?:to |on )?(?:the )?right of",
    "above": r"above|over|on top of", "below": r"below|under|beneath",
}  # fmt: skip
_RELATED = {name: re.compile(rf"(?P<first>.+?) (?:is )?(?:{words}) (?P<second>.+)") for name, words in _RELATIONS.items()}
# A noun phrase of shapes: "two small red circles".
_THING = re.compile(
    rf"(?:(?P<number>an?|the|one|two|three|1|2|3) )?(?:(?P<size>{_any(list(SIZES))}) )?(?:(?P<color>{_any(list(COLORS))}) )?"
    rf"(?P<shape>{_any(list(SHAPES))})(?P<plural>e?s)?"
)
_LETTER_IN = re.compile(rf"(?:the )?letter (?P<letter>{_any([c.lower() for c in LETTERS])})(?: in (?P<color>{_any(list(COLORS))}))?")
_COLORED_LETTER = re.compile(rf"(?:an? |the )?(?P<color>{_any(list(COLORS))}) letter (?P<letter>{_any([c.lower() for c in LETTERS])})")
_COUNTS = {None: 1, "a": 1, "an": 1, "the": 1, "one": 1, "1": 1, "two": 2, "2": 2, "three": 3, "3": 3}


def _mentions(words: str) -> tuple[Mention, ...] | None:
    """The objects of one noun phrase, so two for ``"two small red circles"``; None if it does not follow the grammar."""
    if letter := _LETTER_IN.fullmatch(words) or _COLORED_LETTER.fullmatch(words):
        return (Mention("letter", letter["color"], None, letter["letter"].upper()),)
    thing = _THING.fullmatch(words)
    if thing is None:
        return None
    count = _COUNTS[thing["number"]]
    if (count > 1) != bool(thing["plural"]):  # "two circle" and "a circles" are errors of the writer
        return None
    return (Mention(thing["shape"], thing["color"], thing["size"]),) * count


def parse_caption(text: str) -> Statement | None:
    """Parse a caption; None if it does not follow the grammar.

    The grammar: ``[SIZE] COLOR SHAPE`` joined by "and", commas, "left of", "right of", "above", "below" (or "to the left of", "under" ...);
    "two red circles"; "the letter A in red", "a red letter A"; all with or without "on a gray background", "on gray" or
    "a gray background with" before it; at most :data:`MOST_OBJECTS` objects. Case, a final period and the spelling "grey" do not matter.
    """
    # 1. Spelling, and the background before or after the objects.
    words = re.sub(r"\s+", " ", text.strip().rstrip(".").lower()).replace("grey", "gray")
    words = re.sub(r"^there (?:is|are) ", "", words)
    background = None
    if ground := _BACKGROUND_WITH.fullmatch(words) or _ON_BACKGROUND.fullmatch(words):
        background, words = ground["ground"], ground["subject"]

    # 2. Two objects in a spatial relation.
    for relation, pattern in _RELATED.items():
        if related := pattern.fullmatch(words):
            first, second = _mentions(related["first"]), _mentions(related["second"])
            if first is None or second is None or len(first) != 1 or len(second) != 1:
                return None
            return Statement(first + second, background, relation)

    # 3. Or a list of objects.
    mentions: tuple[Mention, ...] = ()
    for phrase in re.split(r",? and |, ", words):
        found = _mentions(phrase)
        if found is None:
            return None
        mentions += found
    return Statement(mentions, background) if len(mentions) <= MOST_OBJECTS else None


def content(statement: Statement) -> Content | None:
    """The content of the scenes that a statement describes, as :attr:`Scene.content`; None if it leaves out a color or the background."""
    named = [(item.letter or item.shape, item.color) for item in statement.objects if item.color is not None]
    if statement.background is None or len(named) < len(statement.objects):
        return None
    return statement.background, tuple(sorted(named))


def combinations(statement: Statement) -> frozenset[Combination]:
    """The combinations that a statement names, as :attr:`Scene.combinations`."""
    named = {(item.color, item.shape) for item in statement.objects if item.color is not None and not item.letter}
    if statement.relation is None:
        return frozenset(named)
    first, second = statement.objects[:2]
    return frozenset(named | {directed(first.shape, statement.relation, second.shape)})


def _holds(relation: str, first: Object, second: Object) -> bool:
    """True if the centers differ in that direction, and by more than at right angles to it.

    This is weaker than ``scene.relation``, by which captions state relations: an image need not be clearer than right.
    """
    dx, dy = first.x - second.x, first.y - second.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return abs(along) > abs(across) and (along < 0) == (relation in ("left of", "above"))


def match(statement: Statement, scene: Scene) -> list[Object | None]:
    """Match each mention with an object of the scene, or with None if there are fewer objects.

    Among all assignments it takes the one with the most right attributes, then with the most right properties of single objects.
    """
    wanted = len(statement.objects)
    seen: list[Object | None] = list(scene.objects[:MOST_OBJECTS])
    seen += [None] * (wanted - len(seen))

    def quality(order: Sequence[Object | None]) -> tuple[int, int]:
        single = sum(
            (o.color == m.color) + (o.shape == m.shape) + (o.size == m.size)
            for m, o in zip(statement.objects, order, strict=True)
            if o is not None
        )
        return sum(_compare(statement, order).values()), single

    # At most 6! = 720 assignments, so all of them are tried.
    return max((list(order) for order in itertools.permutations(seen, wanted)), key=quality)


def _compare(statement: Statement, seen: Sequence[Object | None]) -> dict[str, bool]:
    """The attributes of the objects, right or wrong, if mention ``i`` is matched with ``seen[i]`` (None: missing)."""
    pairs = list(zip(statement.objects, seen, strict=True))
    outcome = {}
    if any(m.color for m, _ in pairs):
        outcome["color"] = all(o is not None and o.color == m.color for m, o in pairs if m.color)
    if any(m.letter is None for m, _ in pairs):
        outcome["shape"] = all(o is not None and o.shape == m.shape for m, o in pairs if m.letter is None)
    if any(m.size for m, _ in pairs):
        outcome["size"] = all(o is not None and o.size == m.size for m, o in pairs if m.size)
    if any(m.letter for m, _ in pairs):
        outcome["text"] = all(o is not None and o.letter == m.letter for m, o in pairs if m.letter)
    if statement.relation:
        first, second = seen[:2]
        outcome["relation"] = first is not None and second is not None and _holds(statement.relation, first, second)
    return outcome


def check(statement: Statement, scene: Scene) -> dict[str, bool]:
    """For each stated attribute, whether the scene has it right; attributes that the caption does not state are absent.

    Mentions are matched with objects by :func:`match`. An attribute is right if it is for every mention that states it; for a missing
    object it is wrong.
    """
    outcome = {"count": len(scene.objects) == len(statement.objects)}
    if statement.background:
        outcome["background"] = scene.background == statement.background
    outcome |= _compare(statement, match(statement, scene))
    return {name: outcome[name] for name in ATTRIBUTES if name in outcome}


def check_images(captions: Sequence[str], images: Sequence[Image.Image | np.ndarray]) -> list[dict[str, bool] | None]:
    """Read each image and check it against its caption.

    Returns:
        The outcome of :func:`check` for each caption; None if it does not follow the grammar.

    Raises:
        ValueError: if the numbers of captions and images differ.
    """
    if len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions but {len(images)} images")
    statements = [parse_caption(text) for text in captions]
    return [check(statement, read_scene(images[i])) if statement else None for i, statement in enumerate(statements)]


def all_right(outcomes: Sequence[dict[str, bool] | None]) -> dict[int, float]:
    """Composition accuracy of each prompt that follows the grammar, by its position: 1 if every stated attribute is right, else 0."""
    return {i: float(all(outcome.values())) for i, outcome in enumerate(outcomes) if outcome is not None}


def summarize(outcomes: Sequence[dict[str, bool] | None]) -> dict[str, float]:
    """The scores of outcomes, each 0 to 1, higher is better.

    Returns:
        ``composition``, the fraction of prompts with every stated attribute right; ``composition/NAME``, that of attribute NAME among the
        prompts that state it; and ``composition/prompts``, the number of prompts that follow the grammar. Only the last if there are none.
    """
    counted = sum(outcome is not None for outcome in outcomes)
    means = {name: float(np.mean(list(values.values()))) for name, values in by_attribute(outcomes).items()}
    return {"composition/prompts": float(counted)} | means


def by_attribute(outcomes: Sequence[dict[str, bool] | None]) -> dict[str, dict[int, float]]:
    """The outcomes whose means :func:`summarize` returns, by the prompt's position; without names that no prompt states."""
    found = {"composition": all_right(outcomes)}
    for name in ATTRIBUTES:
        found[f"composition/{name}"] = {i: float(outcome[name]) for i, outcome in enumerate(outcomes) if outcome and name in outcome}
    return {name: values for name, values in found.items() if values}


def score(captions: Sequence[str], images: Sequence[Image.Image | np.ndarray]) -> dict[str, float]:
    """:func:`summarize` of :func:`check_images`."""
    return summarize(check_images(captions, images))


def confusions(captions: Sequence[str], images: Sequence[Image.Image | np.ndarray]) -> str:
    """A table of confusions as CSV: how often the prompts state a word (``stated``) and the images show another or the same (``drawn``).

    The columns are ``attribute,stated,drawn,count``, the most frequent pairs of each attribute first.
    """
    counts: Counter[tuple[str, str, str]] = Counter()
    for i, text in enumerate(captions):
        statement = parse_caption(text)
        if statement is None:
            continue
        scene = read_scene(images[i])
        counts["count", str(len(statement.objects)), str(len(scene.objects))] += 1
        if statement.background:
            counts["background", statement.background, scene.background] += 1
        for mention, seen in zip(statement.objects, match(statement, scene), strict=True):
            for name, stated in (("shape", mention.shape), ("color", mention.color), ("size", mention.size), ("letter", mention.letter)):
                if stated is not None:
                    counts[name, stated, str(getattr(seen, name)) if seen is not None else "missing"] += 1
    lines = [f"{','.join(key)},{count}" for key, count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0]))]
    return "\n".join(["attribute,stated,drawn,count", *lines]) + "\n"
