"""Does an image show what its caption states? The share of prompts of which *every* stated attribute is drawn right.

``parse_caption`` turns a caption of the shapes source (or a user's own words within its vocabulary) into a :class:`Statement`;
``read_scene`` reads the image; ``check`` compares. The number of objects must match exactly: an extra object is an error.
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
from cm3leon.scenes.scene import BACKGROUNDS, COLORS, LETTERS, SHAPES, SIZES, Object, Scene

ATTRIBUTES = ("background", "count", "color", "shape", "size", "relation", "text")
MOST_OBJECTS = 6
"""That a caption may state. Of a crowded image only this many are matched; its count is wrong anyway."""


@dataclass(frozen=True)
class Mention:
    """One object as a caption states it; None where the caption says nothing. ``shape`` is ``"letter"`` for a letter."""

    shape: str
    color: str | None = None
    size: str | None = None
    letter: str | None = None


@dataclass(frozen=True)
class Statement:
    """What a caption states. ``relation`` is where the first object lies, seen from the second."""

    objects: tuple[Mention, ...]
    background: str | None = None
    relation: str | None = None


def _any(words: Sequence[str]) -> str:
    return "|".join(words)


_GROUND = _any(list(BACKGROUNDS))
_ON_BACKGROUND = re.compile(rf"(?P<subject>.+?),? (?:on|against|with) (?:(?:an?|the) )?(?P<ground>{_GROUND})(?: background)?")
_BACKGROUND_WITH = re.compile(rf"(?:on )?(?:(?:an?|the) )?(?P<ground>{_GROUND}) background(?: with|,) (?P<subject>.+)")
_RELATIONS = {
    "left of": r"(?:to |on )?(?:the )?left of", "right of": r"(?:to |on )?(?:the )?right of",
    "above": r"above|over|on top of", "below": r"below|under|beneath",
}  # fmt: skip
_RELATED = {place: re.compile(rf"(?P<first>.+?) (?:is )?(?:{words}) (?P<second>.+)") for place, words in _RELATIONS.items()}
_THING = re.compile(
    rf"(?:(?P<number>an?|the|one|two|three|1|2|3) )?(?:(?P<size>{_any(list(SIZES))}) )?(?:(?P<color>{_any(list(COLORS))}) )?"
    rf"(?P<shape>{_any(list(SHAPES))})(?P<plural>e?s)?"
)
_LETTER_IN = re.compile(rf"(?:the )?letter (?P<letter>{_any([c.lower() for c in LETTERS])})(?: in (?P<color>{_any(list(COLORS))}))?")
_COLORED_LETTER = re.compile(rf"(?:an? |the )?(?P<color>{_any(list(COLORS))}) letter (?P<letter>{_any([c.lower() for c in LETTERS])})")
_COUNTS = {None: 1, "a": 1, "an": 1, "the": 1, "one": 1, "1": 1, "two": 2, "2": 2, "three": 3, "3": 3}


def _mentions(words: str) -> tuple[Mention, ...] | None:
    """The objects of one noun phrase: ``"two small red circles"`` gives two."""
    if letter := _LETTER_IN.fullmatch(words) or _COLORED_LETTER.fullmatch(words):
        return (Mention("letter", letter["color"], None, letter["letter"].upper()),)
    thing = _THING.fullmatch(words)
    if thing is None:
        return None
    count = _COUNTS[thing["number"]]
    if (count > 1) != bool(thing["plural"]):
        return None
    return (Mention(thing["shape"], thing["color"], thing["size"]),) * count


def parse_caption(text: str) -> Statement | None:
    """What ``text`` states, or None where it does not follow the grammar.

    Understood: ``[SIZE] COLOR SHAPE`` joined by "and", commas, "left of", "right of", "above", "below" (or "to the left of", "under" ...);
    "two red circles"; "the letter A in red", "a red letter A"; all with or without "on a gray background", "on gray" or
    "a gray background with" before it; at most :data:`MOST_OBJECTS` objects. Case, a final period and the spelling "grey" do not matter.
    """
    words = re.sub(r"\s+", " ", text.strip().rstrip(".").lower()).replace("grey", "gray")
    words = re.sub(r"^there (?:is|are) ", "", words)
    background = None
    if ground := _BACKGROUND_WITH.fullmatch(words) or _ON_BACKGROUND.fullmatch(words):
        background, words = ground["ground"], ground["subject"]
    for place, pattern in _RELATED.items():
        if related := pattern.fullmatch(words):
            first, second = _mentions(related["first"]), _mentions(related["second"])
            if first is None or second is None or len(first) != 1 or len(second) != 1:
                return None
            return Statement(first + second, background, place)
    mentions: tuple[Mention, ...] = ()
    for part in re.split(r",? and |, ", words):
        found = _mentions(part)
        if found is None:
            return None
        mentions += found
    return Statement(mentions, background) if len(mentions) <= MOST_OBJECTS else None


def _holds(place: str, first: Object, second: Object) -> bool:
    """Whether the relation is true: the centers are apart in that direction, and further than across it."""
    dx, dy = first.x - second.x, first.y - second.y
    along, across = (dx, dy) if place in ("left of", "right of") else (dy, dx)
    return abs(along) > abs(across) and (along < 0) == (place in ("left of", "above"))


def match(statement: Statement, scene: Scene) -> list[Object | None]:
    """For each mention the object of the scene that it is taken to be, None for a missing one: so that most attributes are right, then most
    single properties."""
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

    return max((list(order) for order in itertools.permutations(seen, wanted)), key=quality)


def _compare(statement: Statement, seen: Sequence[Object | None]) -> dict[str, bool]:
    """The verdicts on the objects' attributes when mention ``i`` is taken to be ``seen[i]`` (None: missing)."""
    pairs = list(zip(statement.objects, seen, strict=True))
    verdict = {}
    if any(m.color for m, _ in pairs):
        verdict["color"] = all(o is not None and o.color == m.color for m, o in pairs if m.color)
    if any(m.letter is None for m, _ in pairs):
        verdict["shape"] = all(o is not None and o.shape == m.shape for m, o in pairs if m.letter is None)
    if any(m.size for m, _ in pairs):
        verdict["size"] = all(o is not None and o.size == m.size for m, o in pairs if m.size)
    if any(m.letter for m, _ in pairs):
        verdict["text"] = all(o is not None and o.letter == m.letter for m, o in pairs if m.letter)
    if statement.relation:
        first, second = seen[:2]
        verdict["relation"] = first is not None and second is not None and _holds(statement.relation, first, second)
    return verdict


def check(statement: Statement, scene: Scene) -> dict[str, bool]:
    """Whether each stated attribute is right in ``scene``; attributes that the caption does not state are absent.

    Objects are matched to mentions by :func:`match`. Each attribute must hold for every object that states it; a missing object makes its
    attributes wrong.
    """
    verdict = {"count": len(scene.objects) == len(statement.objects)}
    if statement.background:
        verdict["background"] = scene.background == statement.background
    verdict |= _compare(statement, match(statement, scene))
    return {name: verdict[name] for name in ATTRIBUTES if name in verdict}


def verdicts(captions: Sequence[str], images: Sequence[Image.Image | np.ndarray]) -> list[dict[str, bool] | None]:
    """:func:`check` of each pair; None where the caption does not follow the grammar."""
    if len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions but {len(images)} images")
    statements = [parse_caption(text) for text in captions]
    return [check(s, read_scene(image)) if s else None for s, image in zip(statements, images, strict=True)]


def summarize(verdicts: Sequence[dict[str, bool] | None]) -> dict[str, float]:
    """Means over prompts: ``composition`` (every stated attribute right), ``composition/NAME`` over the prompts that state NAME, and
    ``composition/prompts``, the number of prompts counted: those that follow the grammar. Without any, only that last, 0."""
    counted = sum(verdict is not None for verdict in verdicts)
    return {"composition/prompts": float(counted)} | {name: float(np.mean(values)) for name, values in by_attribute(verdicts).items()}


def by_attribute(verdicts: Sequence[dict[str, bool] | None]) -> dict[str, list[bool]]:
    """The verdicts of which :func:`summarize` takes the means, prompt for prompt; only names that some prompt states."""
    counted = [verdict for verdict in verdicts if verdict is not None]
    found = {"composition": [all(verdict.values()) for verdict in counted]}
    found |= {f"composition/{name}": [verdict[name] for verdict in counted if name in verdict] for name in ATTRIBUTES}
    return {name: values for name, values in found.items() if values}


def score(captions: Sequence[str], images: Sequence[Image.Image | np.ndarray]) -> dict[str, float]:
    """:func:`summarize` of :func:`verdicts`."""
    return summarize(verdicts(captions, images))


def confusions(captions: Sequence[str], images: Sequence[Image.Image | np.ndarray]) -> str:
    """What was stated and what was drawn instead, as CSV: ``attribute,stated,drawn,count``, with what is right, the most frequent first."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for text, image in zip(captions, images, strict=True):
        statement = parse_caption(text)
        if statement is None:
            continue
        scene = read_scene(image)
        counts["count", str(len(statement.objects)), str(len(scene.objects))] += 1
        if statement.background:
            counts["background", statement.background, scene.background] += 1
        for mention, seen in zip(statement.objects, match(statement, scene), strict=True):
            for name, stated in (("shape", mention.shape), ("color", mention.color), ("size", mention.size), ("letter", mention.letter)):
                if stated is not None:
                    counts[name, stated, str(getattr(seen, name)) if seen is not None else "missing"] += 1
    lines = [f"{','.join(key)},{count}" for key, count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0]))]
    return "\n".join(["attribute,stated,drawn,count", *lines]) + "\n"


__all__ = [
    "ATTRIBUTES",
    "Mention",
    "Statement",
    "check",
    "confusions",
    "match",
    "parse_caption",
    "read_scene",
    "score",
    "summarize",
    "verdicts",
]
