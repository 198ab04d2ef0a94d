"""What counts as a blank text, and what is no Unicode."""

import pytest

from cm3leon.utils.texts import as_unicode, is_blank, is_unicode


@pytest.mark.parametrize(
    "text", ["", " \t\n", "\u200b", "\ufeff", "\u200d\u2060", "\u3164", "\u2800", "\u00a0", "\u0301", "\ufe0f", "\x00", "\ue000"]
)
def test_nothing_of_it_can_be_seen(text: str) -> None:
    assert is_blank(text)


@pytest.mark.parametrize("text", ["a", " .", "\u200ba", "7", "\U0001f600", "e\u0301", "\u4e2d", "_", "\u0e01"])
def test_something_can_be_seen(text: str) -> None:
    assert not is_blank(text)


@pytest.mark.parametrize(("text", "spelled"), [("caf\udce9", "caf\\xe9"), ("\ud83d!", "\\ud83d!"), ("\udcff\ud800", "\\udcff\\ud800")])
def test_what_is_no_unicode_is_spelled_out(text: str, spelled: str) -> None:
    assert not is_unicode(text) and is_unicode(spelled)
    assert as_unicode(text) == spelled


def test_other_texts_stay_as_they_are() -> None:
    for text in ("", "caf\u00e9", "\U0001f600", "a\\xe9"):
        assert is_unicode(text) and as_unicode(text) == text
