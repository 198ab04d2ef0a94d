"""VQA accuracy as the VQA evaluation server computes it (Antol et al. 2015, section 3; visualqa.org); higher is better.

With ten human answers, the score of an answer is ``min(1, matches / 3)`` against nine of them, averaged over the ten ways to leave one out.
Answers are normalized before matching exactly as by the server, with its quirks, which are named below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

ENOUGH = 4
"""References from which on the server's rule is applied unchanged: with fewer there cannot be three matches among the others."""

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
    """The server's table: each contraction without one of its apostrophes -> the contraction; and one entry of the reverse direction."""
    table = {}
    for word in _EXPANDED.split():
        for position, letter in enumerate(word):
            if letter == "'":
                table[word[:position] + word[position + 1 :]] = word
    table["somebody'd"] = "somebodyd"  # as the server has it
    return table


CONTRACTIONS = _contractions()
# The server's pattern has (?!<=\d) where (?<!\d), "not after a digit", was meant. That condition always holds, so a period is removed
# unless a digit follows.
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_MOST_PERIODS = 32  # the server passes re.UNICODE, which is 32, as the number of replacements


def _strip_punctuation(text: str) -> str:
    """Replace punctuation by a space; remove it if it is next to a space, or if the text has a comma within a number."""
    result = text
    joined = _COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        next_to_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if next_to_space or joined else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def normalize_answer(text: str) -> str:
    """The server's normal form: lower case, no punctuation, no articles, digits for zero to ten and "none" (0), apostrophes restored."""
    text = _strip_punctuation(_strip_space(text))
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _strip_space(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def answer_score(answer: str, references: Sequence[str]) -> float:
    """Score of one answer against its human answers, 0 to 1.

    With :data:`ENOUGH` or more references (VQA v1, VQA v2 and VizWiz have ten) this is exactly the server's rule: the mean over the
    references of ``min(1, matches among the others / 3)``. If all references are equal, the server normalizes *nothing*, so that "Yes."
    does not match ten times "yes".

    With fewer references no answer could reach 1 by that rule. Then all texts are normalized, and as many matches are needed as there are
    other references; with a single reference the score is 1 for an exact match after normalization, else 0.

    Raises:
        ValueError: if there is no reference, or a text instead of a list.
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
    matches_among_others = matches.sum() - matches
    return float(np.minimum(1.0, matches_among_others / min(3, len(matches) - 1)).mean())


def accuracy(answers: Mapping[str, str], annotations: Mapping[str, Sequence[str]]) -> float:
    """Mean score of all annotated questions, percent, unrounded (the server rounds to two decimals).

    Args:
        answers: question id -> answer.
        annotations: question id -> human answers, whose number matters (:func:`answer_score`).

    Raises:
        ValueError: if the two have different questions, there are none, or a question's references are a text or an empty list.
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
