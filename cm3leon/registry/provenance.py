"""Lineage both ways: from a version to what it was made of, and from a document or a license to the versions that were trained on it.

A withdrawn image or license must be answerable: every bundle lists its training documents (``training_data.parquet``).
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import pandas as pd

from cm3leon.data.licenses import identifier_of
from cm3leon.registry.bundle import LINEAGE, TRAINING_DATA
from cm3leon.registry.registry import MODEL_NAME, NotRegisteredError, Version, all_versions, bundle_file, connect
from cm3leon.utils.errors import UserError


@dataclass(frozen=True)
class Use:
    """What a version was trained on, of what was asked for.

    Attributes:
        documents: rows of its training data: id, origin, license, attribution, source; None if the version does not list them.
    """

    version: Version
    documents: pd.DataFrame | None


def lineage_of(number: str) -> dict[str, Any]:
    """What a version was made of: ``lineage.json`` of its bundle, and its documents by license.

    Raises:
        NotRegisteredError: if there is no such version.
    """
    client = connect()
    if number not in {version.number for version in all_versions(client)}:
        raise NotRegisteredError(f"the registry has no version {number} of {MODEL_NAME}; cm3leon status lists them")
    found: dict[str, Any] = json.loads(bundle_file(client, number, LINEAGE))
    data = _training_data(number)
    if data is not None:
        found["documents"] = {str(name): len(rows) for name, rows in data.groupby("licence")}
    return found


def versions_trained_on(document: str | None = None, license_id: str | None = None) -> list[Use]:
    """The versions, newest first, that were trained on a document or on documents of a license, with those documents.

    A version that lists no training data is among them, with None: nothing is known of it.

    Args:
        document: id, or the beginning of one; or its origin, as the manifest has it.
        license_id: SPDX identifier, or another way to state a license (:func:`~cm3leon.data.licenses.identifier_of`).

    Raises:
        UserError: if neither or both are given.
    """
    if (document is None) == (license_id is None):
        raise UserError("lineage looks for a document or for a license: --document ID or --license SPDX")
    license_id = identifier_of(license_id) or license_id  # the manifest has identifiers, where a license is known
    uses = []
    for version in all_versions(connect()):
        data = _training_data(version.number)
        if data is None:
            uses.append(Use(version, None))
            continue
        asked = data["licence"] == license_id if document is None else data["id"].str.startswith(document) | (data["origin"] == document)
        if asked.any():
            uses.append(Use(version, data[asked]))
    return uses


def _training_data(number: str) -> pd.DataFrame | None:
    """The training documents of a version; None if an earlier release of this package registered it, which did not list them."""
    try:
        content = bundle_file(connect(), number, TRAINING_DATA)
    except FileNotFoundError:
        return None
    return pd.read_parquet(io.BytesIO(content))
