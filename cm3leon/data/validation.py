"""The profile pass, which decodes every image once, and the rules that put records in quarantine.

1. :func:`profile_images` decodes every image of the raw manifest: size, hash of the pixels, thumbnail, or why it cannot be read.
2. :func:`check_rows` applies the rules to each record by itself, then finds duplicates among those that break none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from cm3leon.config.schema import ValidateConfig
from cm3leon.data.bounded import bounded_map
from cm3leon.data.excluded import Excluded
from cm3leon.data.images import ImageError, decode
from cm3leon.data.licenses import TERMS, allowed
from cm3leon.data.manifest import ImageStore, records_of
from cm3leon.data.near_duplicates import Likeness
from cm3leon.data.thumbnails import thumbnail_of
from cm3leon.utils.progress import progress
from cm3leon.utils.texts import is_blank

NOTED, NOTE_CHARACTERS = 3, 500
"""Most warnings about an image that are kept, and characters of them."""
BOX_TOLERANCE = 1.0
"""Pixels by which a box may lie outside of its image, because annotations are rounded."""

RULES = {
    "missing": "no image is named, or the file is not there: complete the collection under ingest.path",
    "path_outside_root": "the image path is outside of ingest.path: move the file into it",
    "malformed_row": "a cell cannot be parsed: correct it, or the mapping of columns (ingest.SOURCE.columns)",
    "unknown_original": "edited_from names no row: correct the key",
    "ambiguous_original": "rows of several images have the key that edited_from names: make the keys unique",
    "unreadable": "truncated, or not an image: replace the file",
    "decompression_bomb": "more pixels than validate.max_pixels: reduce the image",
    "too_expensive": "reading it takes more than validate.max_seconds or max_megabytes: save it anew, or raise the limit",
    "file_too_large": "a file of more than max_file_megabytes of the source (ingest.SOURCE): reduce the image, or raise the limit",
    "too_small": "a side shorter than validate.min_side: replace the image",
    "empty_caption": "no caption with text: add one, or map the column (ingest.SOURCE.columns)",
    "caption_too_long": "a caption longer than validate.max_caption_characters: shorten it",
    "licence_not_allowed": "no license, or one that is not in validate.licenses: state it, or add it there",
    "attribution_missing": "the license asks to name the author: fill the column attribution, or set ingest.SOURCE.attribution",
    "box_outside_image": "an object's box is empty or extends outside of the image: correct the box",
    "unreadable_condition": "a condition image is truncated, too large, or not an image: replace the file",
    "excluded": "like an image or a caption in data/excluded, which keeps it out: to accept it, remove that one",
    "duplicate": "the same pixels as an earlier accepted record: remove one",
}
"""Reason code -> its meaning and what to do; ``SOURCE`` is the name of the source. A source may add codes of its own."""


@dataclass
class Profile:
    """Facts about one record's image.

    Attributes:
        width: pixels; 0 if the image cannot be read.
        height: as ``width``.
        pixels: hash of size and RGB values; None if the image cannot be read.
        thumbnail: see :func:`cm3leon.data.thumbnails.thumbnail_of`; empty if the image cannot be read.
        reason: reason code if the image cannot be read.
        detail: for the message, as ``reason``.
        note: what had to be guessed to read the image.
        bad_condition: kind of a condition image that cannot be read, and why.
    """

    width: int = 0
    height: int = 0
    pixels: str | None = None
    thumbnail: bytes = b""
    reason: str | None = None
    detail: str | None = None
    note: str | None = None
    bad_condition: str | None = None


def profile_image(store: ImageStore, ref: str | None, conditions: Sequence[dict[str, str]], max_pixels: int) -> Profile:
    """Decode one record's image and condition images. Without an image (``ref`` None) the profile is empty."""
    profile = Profile()
    if ref is not None:
        try:
            image = decode(store.read(ref), max_pixels)
            profile.width, profile.height = image.size
            profile.note = image.info.get("note")
            content = hashlib.sha256(f"{image.size}".encode())
            content.update(image.tobytes())
            profile.pixels = content.hexdigest()
            profile.thumbnail = thumbnail_of(image)
        except ImageError as error:
            profile.reason, profile.detail = error.reason, error.detail
    for condition in conditions:
        try:
            decode(store.read(condition["image"]), max_pixels)
        except ImageError as error:
            profile.bad_condition = f"{condition['kind']}: {error}"
    return profile


def profile_images(store: ImageStore, frame: pd.DataFrame, config: ValidateConfig) -> list[Profile]:
    """Profiles of all records of a raw manifest, in order, by ``config.workers`` processes.

    A record whose images take longer than ``config.max_seconds``, or more memory than ``config.max_megabytes``, is ``too_expensive``. What
    Pillow and the libraries that decode warn of is noted.
    """
    rows = list(zip(frame["image"], frame["conditions"], strict=True))

    def profile(row: tuple[str | None, list[dict[str, str]]]) -> Profile:
        return profile_image(store, *row, config.max_pixels)

    profiles: list[Profile] = []
    with progress("validate: decoding", len(rows), "images") as meter:
        for done in bounded_map(profile, rows, config.workers, config.max_seconds, config.max_megabytes):
            found = done.result or Profile(reason="too_expensive", detail=f"took {done.excess}")
            told = "; ".join(filter(None, [found.note, *done.warnings[:NOTED]]))
            profiles.append(replace(found, note=told[:NOTE_CHARACTERS] or None))
            meter.advance(1)
    return profiles


NOTHING = Excluded()
Findings = list[tuple[str, str]]
"""Reason code and detail of each rule that a record breaks."""


def check_rows(frame: pd.DataFrame, profiles: list[Profile], config: ValidateConfig, excluded: Excluded = NOTHING) -> list[Findings]:
    """Every rule that each record of a raw manifest breaks.

    Among records with the same pixels the first that breaks no rule is kept, and those after it are each a ``duplicate``.
    """
    # 1. The rules that need one record.
    records = records_of(frame)
    licenses = allowed(config.licenses)
    findings = [list(_check_record(record, profile, config, licenses)) for record, profile in zip(records, profiles, strict=True)]

    # 2. What is to be kept out.
    like = excluded.images_like([profile.thumbnail for profile in profiles], Likeness.of(config))
    for found, file, captions in zip(findings, like, frame["captions"], strict=True):
        if line := excluded.caption_of(captions):
            found.append(("excluded", f"the caption in {line}"))
        if file:
            found.append(("excluded", f"like {file}"))

    # 3. Duplicates. A record that breaks a rule does not make its copies duplicates, else no copy would be left.
    kept: dict[str, str] = {}  # hash of the pixels -> origin of the record that is kept
    for found, profile, origin in zip(findings, profiles, frame["origin"], strict=True):
        if profile.pixels is None:
            continue
        if profile.pixels in kept:
            found.append(("duplicate", f"same pixels as {kept[profile.pixels]}"))
        elif not found:
            kept[profile.pixels] = origin
    return findings


def _check_record(record: dict[str, Any], profile: Profile, config: ValidateConfig, licenses: set[str]) -> Iterator[tuple[str, str]]:
    """The rules that need no other record."""
    if record["problem"]:
        for problem in record["problem"].split(","):
            yield problem, record["detail"] or ""
    elif record["image"] is None:
        yield "missing", "the source gave no image"
    if profile.reason:
        yield profile.reason, profile.detail or ""
    if profile.pixels and min(profile.width, profile.height) < config.min_side:
        yield "too_small", f"{profile.width}x{profile.height} pixels, {config.min_side} a side needed"
    lengths = [len(caption.strip()) for caption in record["captions"] if caption and not is_blank(caption)]
    # The captions of a malformed row may only look empty because they could not be parsed.
    if not any(lengths) and "malformed_row" not in (record["problem"] or ""):
        yield "empty_caption", f"{len(record['captions'])} captions, none with text"
    if max(lengths, default=0) > config.max_caption_characters:
        yield "caption_too_long", f"{max(lengths)} characters, {config.max_caption_characters} allowed"
    if record["licence"] not in licenses:
        yield "licence_not_allowed", record["licence"] or "none stated"
    elif (terms := TERMS.get(record["licence"])) and terms.attribution and is_blank(record["attribution"] or ""):
        yield "attribution_missing", f"{record['licence']} asks to name the author"
    if profile.pixels:
        for item in record["objects"]:
            if not _inside(item["box"], profile.width, profile.height):
                box = ", ".join(f"{side:g}" for side in item["box"])
                yield "box_outside_image", f"{item['label']} [{box}] in {profile.width}x{profile.height}"
                break
    if profile.bad_condition:
        yield "unreadable_condition", profile.bad_condition


def _inside(box: list[float], width: int, height: int) -> bool:
    x0, y0, x1, y1 = box if len(box) == 4 else (0.0, 0.0, 0.0, 0.0)
    tolerance = BOX_TOLERANCE
    return -tolerance <= x0 < x1 <= width + tolerance and -tolerance <= y0 < y1 <= height + tolerance  # also false for NaN
