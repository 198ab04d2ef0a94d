"""Texts of people: what of them can be seen, and when two are the same."""

from __future__ import annotations

import unicodedata

_INVISIBLE = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols without a glyph: fillers of Hangul, and the empty Braille pattern."""


def is_blank(text: str) -> bool:
    """True if nothing of a text can be seen: blanks, control and zero-width characters, byte order marks, marks without a letter."""
    return all(character in _INVISIBLE or unicodedata.category(character)[0] in "CZM" for character in text)


def is_unicode(text: str) -> bool:
    """False if some of a text is no Unicode: bytes of an argument or a file's name that are not UTF-8, or half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def as_unicode(text: str) -> str:
    """A text in which what is no Unicode is spelled out: bytes as ``\\xe9``, half of a surrogate pair as ``\\ud800``."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


def folded(text: str) -> str:
    """A text as it is compared word for word: without case, accents' encodings, punctuation, and all but single spaces between words."""
    characters = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in characters).split())
