"""The profile pass, which decodes every image once, and the rules that put rows in quarantine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from cm3leon.config.schema import ValidateConfig
from cm3leon.data.images import ImageError, decode
from cm3leon.data.manifest import ImageStore
from cm3leon.utils.progress import progress

THUMBNAIL = 8
CHUNK = 64
BOX_TOLERANCE = 1.0
"""Pixels by which a box may lie outside of its image: annotations are rounded."""

RULES = {
    "missing": "no image is named, or the file is not there: complete the collection under ingest.path",
    "path_outside_root": "the image path leaves ingest.path: move the file into it",
    "malformed_row": "a cell cannot be understood: correct it, or the mapping ingest.folder.columns",
    "unknown_original": "edited_from names no row: correct the key",
    "unreadable": "truncated, or no image: replace the file",
    "decompression_bomb": "more pixels than validate.max_pixels",
    "too_small": "a side shorter than validate.min_side",
    "empty_caption": "no caption with text: add one, or map the column with ingest.folder.columns",
    "caption_too_long": "a caption longer than validate.max_caption_characters",
    "licence_not_allowed": "no licence, or one not in validate.licenses",
    "box_outside_image": "an object's box is empty or leaves the image: correct the box",
    "unreadable_condition": "a condition image is truncated, too large, or no image: replace the file",
    "duplicate": "the same pixels as an earlier accepted row: remove one",
}
"""Reason code -> what it means and what to do. A source may add its own codes."""


@dataclass
class Profile:
    """What one image's pixels tell. ``reason`` is set, and the rest is not, when they cannot be read."""

    width: int = 0
    height: int = 0
    pixels: str | None = None  # hash of size and RGB values
    thumbnail: bytes = b""  # THUMBNAIL x THUMBNAIL RGB bytes, each the mean of its area
    reason: str | None = None
    detail: str | None = None
    bad_condition: str | None = None


def thumbnail_of(image: Image.Image) -> bytes:
    """THUMBNAIL x THUMBNAIL RGB bytes, each the mean of its area."""
    return image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX).tobytes()


def profile_image(store: ImageStore, ref: str | None, conditions: Sequence[dict[str, str]], max_pixels: int) -> Profile:
    """Decode one row's image and condition images; ``ref`` None (the source had no image to give) is an empty profile."""
    profile = Profile()
    if ref is not None:
        try:
            image = decode(store.read(ref), max_pixels)
            profile.width, profile.height = image.size
            profile.pixels = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
            profile.thumbnail = thumbnail_of(image)
        except ImageError as error:
            profile.reason, profile.detail = error.reason, error.detail
    for condition in conditions:
        try:
            decode(store.read(condition["image"]), max_pixels)
        except ImageError as error:
            profile.bad_condition = f"{condition['kind']}: {error}"
    return profile


def profile_images(store: ImageStore, frame: pd.DataFrame, max_pixels: int, workers: int) -> list[Profile]:
    """Profiles of all rows of a raw manifest, in order, on ``workers`` threads (decoding releases the interpreter's lock)."""
    rows = list(zip(frame["image"], frame["conditions"], strict=True))
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]

    def work(chunk: list[tuple[str | None, list[dict[str, str]]]]) -> list[Profile]:
        return [profile_image(store, ref, conditions, max_pixels) for ref, conditions in chunk]

    profiles: list[Profile] = []
    with ThreadPoolExecutor(workers) as pool, progress("validate: decoding", len(rows), "images") as meter:
        for part in pool.map(work, chunks):
            profiles += part
            meter.advance(len(part))
    return profiles


Findings = list[tuple[str, str]]
"""Reason code and detail of each rule that a row breaks."""


def check_rows(frame: pd.DataFrame, profiles: list[Profile], config: ValidateConfig) -> list[Findings]:
    """What is wrong with each row of a raw manifest: every rule it breaks.

    A row is a ``duplicate`` of an earlier row with the same pixels that breaks no rule: of several copies the first good one is kept.
    """
    rows: list[dict[str, Any]] = frame.to_dict("records")  # type: ignore[assignment]
    findings = [list(_check_row(row, profile, config)) for row, profile in zip(rows, profiles, strict=True)]
    kept: dict[str, str] = {}
    for found, profile, origin in zip(findings, profiles, frame["origin"], strict=True):
        if profile.pixels is None:
            continue
        if profile.pixels in kept:
            found.append(("duplicate", f"same pixels as {kept[profile.pixels]}"))
        elif not found:
            kept[profile.pixels] = origin
    return findings


def _check_row(row: dict[str, Any], profile: Profile, config: ValidateConfig) -> Iterator[tuple[str, str]]:
    """The rules that need no other row."""
    if row["problem"]:
        for problem in row["problem"].split(","):
            yield problem, row["detail"] or ""
    elif row["image"] is None:
        yield "missing", "the source gave no image"
    if profile.reason:
        yield profile.reason, profile.detail or ""
    if profile.pixels and min(profile.width, profile.height) < config.min_side:
        yield "too_small", f"{profile.width}x{profile.height} pixels, {config.min_side} a side needed"
    lengths = [len(caption.strip()) for caption in row["captions"] if caption]
    if not any(lengths) and "malformed_row" not in (row["problem"] or ""):
        yield "empty_caption", f"{len(row['captions'])} captions, none with text"
    if max(lengths, default=0) > config.max_caption_characters:
        yield "caption_too_long", f"{max(lengths)} characters, {config.max_caption_characters} allowed"
    if row["licence"] not in config.licenses:
        yield "licence_not_allowed", row["licence"] or "none stated"
    if profile.pixels:
        for item in row["objects"]:
            if not _inside(item["box"], profile.width, profile.height):
                yield "box_outside_image", f"{item['label']} {item['box']} in {profile.width}x{profile.height}"
                break
    if profile.bad_condition:
        yield "unreadable_condition", profile.bad_condition


def _inside(box: list[float], width: int, height: int) -> bool:
    x0, y0, x1, y1 = box if len(box) == 4 else (0.0, 0.0, 0.0, 0.0)
    slack = BOX_TOLERANCE
    return -slack <= x0 < x1 <= width + slack and -slack <= y0 < y1 <= height + slack  # also false for NaN


def thumbnails_of(profiles: Sequence[Profile]) -> np.ndarray:
    """uint8 (n, 192) of profiles that all have pixels."""
    return np.frombuffer(b"".join(profile.thumbnail for profile in profiles), dtype=np.uint8).reshape(-1, THUMBNAIL * THUMBNAIL * 3)
