"""Licenses as people state them, and what they ask."""

from __future__ import annotations

import pytest

from cm3leon.data.licenses import TERMS, allowed, identifier_of, obligation


@pytest.mark.parametrize(
    ("stated", "identifier"),
    [
        ("MIT", "MIT"),
        ("mit", "MIT"),
        ("cc-by-4.0", "CC-BY-4.0"),
        ("CC BY 4.0", "CC-BY-4.0"),
        ("CC BY-SA 3.0", "CC-BY-SA-3.0"),
        ("cc by nc sa 2.0", "CC-BY-NC-SA-2.0"),
        ("Creative Commons Attribution 4.0 International", "CC-BY-4.0"),
        ("Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0)", "CC-BY-SA-4.0"),
        ("Attribution-NonCommercial-NoDerivs 2.0 Generic", "CC-BY-NC-ND-2.0"),
        ("Attribution-NonCommercial-ShareAlike License 2.0", "CC-BY-NC-SA-2.0"),
        ("https://creativecommons.org/licenses/by/4.0/", "CC-BY-4.0"),
        ("http://creativecommons.org/licenses/by-nc-nd/2.0/deed.en", "CC-BY-NC-ND-2.0"),
        ("creativecommons.org/licenses/by-sa/3.0/legalcode", "CC-BY-SA-3.0"),
        ("https://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0"),
        ("https://creativecommons.org/publicdomain/mark/1.0/", "CC-PDM-1.0"),
        ("CC0", "CC0-1.0"),
        ("CC0 1.0 Universal", "CC0-1.0"),
        ("Public Domain Mark", "CC-PDM-1.0"),
        ("  Apache License 2.0 ", "Apache-2.0"),
        *[(identifier.lower(), identifier) for identifier in TERMS],
    ],
)
def test_spellings_are_known(stated: str, identifier: str) -> None:
    assert identifier_of(stated) == identifier


@pytest.mark.parametrize(
    "stated",
    [
        None, "", "unknown", "proprietary", "CC BY", "CC", "Creative Commons", "All rights reserved", "CC BY 4.0 or my own", "free",
        "CC BY 3.0 and CC BY 4.0", "not CC BY 4.0", "https://creativecommons.org/licenses/by/", "CC BY-XX 4.0", "CC SA 1.0",
        "https://example.org/licenses/by/4.0/",
        "https://creativecommons.org.example.org/licenses/by/4.0/", "CC BY 9.0",
    ],
)  # fmt: skip
def test_what_is_not_known_is_not_guessed(stated: str | None) -> None:
    assert identifier_of(stated) is None


def test_uses_stand_for_the_licenses_that_allow_them() -> None:
    commercial, research = allowed(["commercial"]), allowed(["research"])
    assert {"MIT", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0"} <= commercial
    assert research - commercial == {identifier for identifier in TERMS if "NC" in identifier and "ND" not in identifier}
    assert not any("ND" in identifier for identifier in research)
    assert allowed(["LicenseRef-mine", "commercial"]) == {"LicenseRef-mine", *commercial}
    assert allowed(["MIT"]) == {"MIT"}


def test_listed_licenses_may_be_spelled_as_records_spell_them() -> None:
    assert allowed(["cc-by-4.0", "CC BY-SA 3.0", "https://creativecommons.org/publicdomain/zero/1.0/", "mine"]) == {
        "CC-BY-4.0", "CC-BY-SA-3.0", "CC0-1.0", "mine",
    }  # fmt: skip


def test_obligations_are_those_of_the_deeds() -> None:
    assert obligation("CC0-1.0") == "none"
    assert obligation("LicenseRef-mine") == "read the license"
    assert "no commercial use" in obligation("CC-BY-NC-SA-4.0") and "same license" in obligation("CC-BY-NC-SA-4.0")
    assert obligation("Apache-2.0") == "keep license and notices; state changes"
    assert obligation("CC-BY-2.0") == "name the author, link the license, state changes"
