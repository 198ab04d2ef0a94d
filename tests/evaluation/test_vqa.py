"""VQA accuracy: the rules of the evaluation server, by hand-computed cases."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3leon.evaluation.vqa import CONTRACTIONS, accuracy, answer_score, normalize_answer


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Red Circle", "red circle"),
        ("two", "2"),
        ("none", "0"),
        ("ten dogs and a cat", "10 dogs and cat"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # one apostrophe may be missing, not two
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the server's own mistake
        ("hello, world", "hello world"),  # next to a space: removed
        ("black/white", "black white"),  # between letters: replaced by a space
        ("1,000", "1000"),
        ("1,000/yes", "1000yes"),  # a comma in a number removes all punctuation
        ("3.5", "3.5"),
        ("3.", "3"),
        ("u.s.", "us"),
        ("yes!\n", "yes"),
        ("  tab\there ", "tab here"),
        ("what's", "what's"),
        ("50%", "50%"),
    ],
)
def test_normalize(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


def test_only_the_first_32_periods_are_removed() -> None:
    assert normalize_answer("." * 40) == "." * 8


def test_contractions_have_exactly_one_apostrophe_missing() -> None:
    assert len(CONTRACTIONS) == 114
    for short, full in CONTRACTIONS.items():
        assert short == "somebody'd" or len(full) == len(short) + 1


@pytest.mark.parametrize(("matching", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_ten_annotators(matching: int, expected: float) -> None:
    """With m matches, leaving out one of the m leaves m - 1, leaving out another leaves m."""
    references = ["red"] * matching + [f"other {i}" for i in range(10 - matching)]
    assert answer_score("red", references) == pytest.approx(expected)
    assert answer_score("Red.", references) == pytest.approx(expected)


def test_unanimous_answers_are_not_normalized() -> None:
    assert answer_score("yes", ["yes"] * 10) == 1
    assert answer_score("Yes.", ["yes"] * 10) == 0
    assert answer_score("Yes.", ["yes"] * 9 + ["no"]) == 1
    assert answer_score(" yes\n", ["yes"] * 10) == 1
    assert answer_score("Yes.", ["yes"] * 4) == 0 and answer_score("Yes.", ["yes"] * 3) == 1


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("Two.", ["2"], 1.0),
        ("three", ["2"], 0.0),
        ("red", ["red", "red"], 1.0),
        ("red", ["red", "blue"], 0.5),
        ("red", ["red", "red", "blue"], (0.5 + 0.5 + 1.0) / 3),
        ("red", ["red"] * 5, 1.0),
    ],
)
def test_fewer_annotators(answer: str, references: list[str], expected: float) -> None:
    assert answer_score(answer, references) == pytest.approx(expected)


def test_accuracy_is_the_mean_in_percent() -> None:
    annotations = {"a": ["red"], "b": ["2"], "c": ["yes"], "d": ["no"]}
    assert accuracy({"a": "a red", "b": "two", "c": "no", "d": "No!"}, annotations) == pytest.approx(75)


def test_unanswered_and_unannotated_questions_are_an_error() -> None:
    with pytest.raises(ValueError, match="1 unanswered"):
        accuracy({}, {"q": ["yes"]})
    with pytest.raises(ValueError, match="1 not annotated"):
        accuracy({"q": "yes"}, {})
    with pytest.raises(ValueError, match="'q' needs a list of reference answers"):
        accuracy({"q": "yes"}, {"q": "yes"})
    with pytest.raises(ValueError, match="'q' has no reference"):
        accuracy({"q": "yes"}, {"q": []})
    with pytest.raises(ValueError, match="no questions"):
        accuracy({}, {})


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(["red", "blue", "a red", "2", "two"]), min_size=1, max_size=12),
    st.sampled_from(["red", "blue", "two", "x"]),
)
def test_scores_are_between_0_and_1_and_order_does_not_matter(references: list[str], answer: str) -> None:
    value = answer_score(answer, references)
    assert 0 <= value <= 1
    assert answer_score(answer, references[::-1]) == pytest.approx(value)
    assert answer_score("nothing like it", references) == 0


@settings(max_examples=40)
@given(st.text(max_size=30))
def test_normal_form_has_single_spaces_only(text: str) -> None:
    normal = normalize_answer(text)
    assert normal == " ".join(normal.split())
