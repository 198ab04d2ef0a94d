"""Licenses of records: what people write, as SPDX identifiers, and what each asks of who uses the work.

Sources: the SPDX license list (spdx.org/licenses) and the deeds of Creative Commons (creativecommons.org/licenses). Not legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

USES = ("commercial", "research")
"""Names for sets of licenses in ``validate.licenses``: those that allow changed works for commercial use, or for research at least."""


@dataclass(frozen=True)
class Terms:
    """What a license asks, and forbids.

    Attributes:
        attribution: the author must be named.
        notices: license and copyright notice stay with copies.
        share_alike: changed works must have the same license.
        non_commercial: only for non-commercial use.
        no_derivatives: changed works may not be passed on.
        state_changes: what was changed must be said, where that is not part of the attribution.
    """

    attribution: bool = False
    notices: bool = False
    share_alike: bool = False
    non_commercial: bool = False
    no_derivatives: bool = False
    state_changes: bool = False

    def allow(self, use: str) -> bool:
        """Whether they allow one of :data:`USES`, of changed works: a model makes new works of what it was trained on."""
        return not self.no_derivatives and not (use == "commercial" and self.non_commercial)

    @property
    def obligations(self) -> list[str]:
        """What they ask, in words."""
        asked = {
            "name the author, link the license, state changes": self.attribution,
            "keep license and notices": self.notices,
            "state changes": self.state_changes,
            "share changed works under the same license": self.share_alike,
            "no commercial use": self.non_commercial,
            "no changed works": self.no_derivatives,
        }
        return [text for text, is_asked in asked.items() if is_asked]


_KINDS = ("by", "by-sa", "by-nc", "by-nd", "by-nc-sa", "by-nc-nd")
_VERSIONS = ("1.0", "2.0", "2.5", "3.0", "4.0")
TERMS: dict[str, Terms] = {
    **{
        f"CC-{kind.upper()}-{version}": Terms(True, False, "sa" in kind, "nc" in kind, "nd" in kind)
        for kind in _KINDS
        for version in _VERSIONS
    },
    **dict.fromkeys(("CC0-1.0", "CC-PDM-1.0", "CC-PDDC", "PDDL-1.0", "Unlicense", "0BSD", "MIT-0"), Terms()),
    **dict.fromkeys(("MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "OFL-1.1"), Terms(notices=True)),
    "Apache-2.0": Terms(notices=True, state_changes=True),
    "ODC-By-1.0": Terms(attribution=True),
    "ODbL-1.0": Terms(attribution=True, share_alike=True),
    **dict.fromkeys(
        ("GPL-2.0-only", "GPL-2.0-or-later", "GPL-3.0-only", "GPL-3.0-or-later", "GFDL-1.3-or-later"), Terms(notices=True, share_alike=True)
    ),
}
"""SPDX identifier -> terms, of the licenses that images and texts usually have."""

_BY_LOWER_CASE = {identifier.lower(): identifier for identifier in TERMS}
_ADDRESS = re.compile(
    r"(?:https?://)?(?:www\.)?creativecommons\.org/(licenses|publicdomain)/([a-z-]+)(?:/([0-9.]+))?(?:/.*)?", re.IGNORECASE
)
_WORDS = {
    "attribution": "by", "sharealike": "sa", "noncommercial": "nc", "noderivatives": "nd", "noderivs": "nd",
    "by": "by", "sa": "sa", "nc": "nc", "nd": "nd",
}  # fmt: skip
_FILLERS = {
    "cc",
    "creative",
    "commons",
    "license",
    "licence",
    "international",
    "unported",
    "generic",
    "public",
    "the",
    "version",
    "v",
    "deed",
}
_SPELLINGS = {
    "apache license 2.0": "Apache-2.0", "apache license, version 2.0": "Apache-2.0", "apache 2.0": "Apache-2.0", "apache2": "Apache-2.0",
    "mit license": "MIT", "the mit license": "MIT", "bsd 3-clause": "BSD-3-Clause", "bsd 2-clause": "BSD-2-Clause", "odbl": "ODbL-1.0",
    "public domain mark": "CC-PDM-1.0", "public domain mark 1.0": "CC-PDM-1.0", "pdm": "CC-PDM-1.0", "pdm 1.0": "CC-PDM-1.0",
    "cc pdm 1.0": "CC-PDM-1.0", "cc0": "CC0-1.0", "cc zero": "CC0-1.0", "cc0 1.0": "CC0-1.0", "cc0 1.0 universal": "CC0-1.0",
    "cc0 1.0 universal (cc0 1.0) public domain dedication": "CC0-1.0", "creative commons zero": "CC0-1.0",
    "creative commons zero v1.0 universal": "CC0-1.0", "cc0 1.0 public domain dedication": "CC0-1.0",
}  # fmt: skip


def identifier_of(stated: str | None) -> str | None:
    """The SPDX identifier of a license as people state it: an identifier in any case, an address of Creative Commons, or a name.

    None if it is not known, also for a license of Creative Commons without its version: their terms differ.
    """
    text = " ".join((stated or "").split())
    if text.lower() in _BY_LOWER_CASE:
        return _BY_LOWER_CASE[text.lower()]
    if address := _ADDRESS.fullmatch(text):
        place, kind, version = (part and part.lower() for part in address.groups())
        if place == "publicdomain":
            return {"zero": "CC0-1.0", "mark": "CC-PDM-1.0", "certification": "CC-PDDC"}.get(kind or "")
        return _BY_LOWER_CASE.get(f"cc-{kind}-{version}")
    if text.lower() in _SPELLINGS:
        return _SPELLINGS[text.lower()]
    return _creative_commons(text.lower())


def _creative_commons(text: str) -> str | None:
    """CC BY-SA 4.0, "Creative Commons Attribution-ShareAlike 4.0 International", and the like."""
    version = re.findall(r"\b[1-4]\.[05]\b", text)
    words = re.findall(r"[a-z]+", text.replace("non-commercial", "noncommercial").replace("share-alike", "sharealike"))
    kinds = [_WORDS[word] for word in words if word in _WORDS]
    if len(set(version)) != 1 or "by" not in kinds or any(word not in _WORDS and word not in _FILLERS for word in words):
        return None
    parts = [part for part in ("by", "nc", "nd", "sa") if part in kinds]
    return _BY_LOWER_CASE.get(f"cc-{'-'.join(parts)}-{version[0]}")


def allowed(listed: Iterable[str]) -> set[str]:
    """The licenses that a list stands for: those that it names, in any spelling, and all that allow a use of :data:`USES` in it."""
    found = {identifier_of(name) or name for name in listed}
    for use in found & set(USES):
        found |= {identifier for identifier, terms in TERMS.items() if terms.allow(use)}
    return found - set(USES)


def obligation(identifier: str) -> str:
    """What a license asks of whoever passes the material on, in short."""
    terms = TERMS.get(identifier)
    return "read the license" if terms is None else "; ".join(terms.obligations) or "none"
