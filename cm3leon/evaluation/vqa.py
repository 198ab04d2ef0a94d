"""Accuracy of answers to visual questions, as the VQA evaluation server counts it (Antol et al. 2015, section 3; visualqa.org).

With ten human answers, an answer scores ``min(1, matches / 3)`` against each nine of them, averaged. The normalization before matching
repeats the server's, quirks included; they are named where they occur.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

ENOUGH = 4
"""Number of reference answers from which the server's rule, three matches among the others, can be met."""

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset({"a", "an", "the"})
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(_COUNTED)} | {"none": "0"}

_EXPANDED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's
isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """The server's table: each contraction without one of its apostrophes to the contraction, and one entry in the other direction."""
    table = {}
    for word in _EXPANDED.split():
        for position, letter in enumerate(word):
            if letter == "'":
                table[word[:position] + word[position + 1 :]] = word
    table["somebody'd"] = "somebodyd"  # as the server has it
    return table


CONTRACTIONS = _contractions()
# The server means "not after a digit" by (?!<=\d) but writes a condition that always holds: a period goes unless a digit follows it.
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_MOST_PERIODS = 32  # the server passes re.UNICODE, which is 32, as the number of replacements


def _strip_punctuation(text: str) -> str:
    """Remove punctuation next to a space, or all of it if a number has a comma; otherwise replace it by a space."""
    result = text
    joined = _COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or joined else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def normalize_answer(text: str) -> str:
    """The server's normal form: no punctuation, lower case, digits for zero to ten ("none" is 0), no articles, apostrophes restored."""
    text = _strip_punctuation(_strip_space(text))
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _strip_space(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def answer_score(answer: str, references: Sequence[str]) -> float:
    """Score in [0, 1] of one answer against its human answers.

    With :data:`ENOUGH` or more references (VQA v1, VQA v2 and VizWiz have ten) this is the server's rule to the letter: the mean, over
    the references, of ``min(1, matches among the others / 3)``; and unless the references differ among themselves, *nothing is
    normalized*, so that "Yes." does not match ten times "yes".

    With fewer references no answer could be wholly right by that rule. Here both sides are then always normalized and the bar of three
    matches drops to as many as there are other references; a single reference is an exact match after normalization.

    Raises:
        ValueError: if there is no reference, or one text in the place of a list of them.
    """
    if isinstance(references, str):
        raise ValueError(f"references must be a list of answers, found the text {references!r}")
    if not references:
        raise ValueError("no reference answers")
    answer, cleaned = _strip_space(answer), [_strip_space(reference) for reference in references]
    if len(cleaned) < ENOUGH or len(set(cleaned)) > 1:
        answer, cleaned = normalize_answer(answer), [normalize_answer(reference) for reference in cleaned]
    matches = np.array([reference == answer for reference in cleaned], dtype=np.int64)
    if len(matches) == 1:
        return float(matches[0])
    others = matches.sum() - matches
    return float(np.minimum(1.0, others / min(3, len(matches) - 1)).mean())


def accuracy(answers: Mapping[str, str], annotations: Mapping[str, Sequence[str]]) -> float:
    """Mean score over all annotated questions, percent, unrounded (the server rounds to two decimals).

    Args:
        answers: question id -> answer.
        annotations: question id -> human answers; see :func:`answer_score` for how their number matters.

    Raises:
        ValueError: if the two do not name the same questions, there are none, or a question's references are no list or an empty one.
    """
    if answers.keys() != annotations.keys():
        missing, unknown = sorted(annotations.keys() - answers.keys()), sorted(answers.keys() - annotations.keys())
        raise ValueError(
            f"answers and annotations differ: {len(missing)} unanswered {missing[:3]}, {len(unknown)} not annotated {unknown[:3]}"
        )
    if not answers:
        raise ValueError("no questions to score")
    for question, references in annotations.items():
        if isinstance(references, str):
            raise ValueError(f"question {question!r} needs a list of reference answers, found the text {references!r}")
        if not references:
            raise ValueError(f"question {question!r} has no reference answers")
    return 100 * float(np.mean([answer_score(answers[question], annotations[question]) for question in annotations]))
