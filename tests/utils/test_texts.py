"""What counts as a blank text."""

import pytest

from cm3leon.utils.texts import is_blank


@pytest.mark.parametrize(
    "text", ["", " \t\n", "\u200b", "\ufeff", "\u200d\u2060", "\u3164", "\u2800", "\u00a0", "\u0301", "\ufe0f", "\x00", "\ue000"]
)
def test_nothing_of_it_can_be_seen(text: str) -> None:
    assert is_blank(text)


@pytest.mark.parametrize("text", ["a", " .", "\u200ba", "7", "\U0001f600", "e\u0301", "\u4e2d", "_", "\u0e01"])
def test_something_can_be_seen(text: str) -> None:
    assert not is_blank(text)
