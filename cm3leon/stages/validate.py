"""``validate``: decode every image once, quarantine what breaks a rule, pass a Great Expectations gate, divide into splits.

Writes to ``data/validated/``: ``manifest.parquet`` (accepted records), ``rejected.parquet`` (the others, with ``reasons`` and ``detail``),
``thumbnails.parquet`` (of the accepted ones) and ``report.json`` (counts). Every record read is either accepted or rejected. Pages for a
person are ``models/runs/validate/data_docs/index.html``, the Data Docs, and ``data_report.html`` next to it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from cm3leon.config import paths
from cm3leon.config.schema import Config, ValidateConfig
from cm3leon.data import data_docs, data_report, expectations, last_accepted, licenses, splits, thumbnails
from cm3leon.data.excluded import Excluded
from cm3leon.data.links import linked_rows
from cm3leon.data.manifest import MANIFEST_SCHEMA, SPLITS, VALIDATED_SCHEMA, ImageStore, read_manifest, write_manifest
from cm3leon.data.near_duplicates import Likeness, near_duplicate_groups, similar_groups
from cm3leon.data.validation import RULES, Findings, check_rows, profile_images
from cm3leon.tracking import runs
from cm3leon.utils.errors import UserError
from cm3leon.utils.texts import is_blank

_RAW_FIELDS = [field for field in MANIFEST_SCHEMA if field.name != "detail"]
REJECTED_SCHEMA = pa.schema([*_RAW_FIELDS, ("reasons", pa.list_(pa.string())), ("detail", pa.string())])
EXAMPLES = 3
"""Most records that an error names for a rule."""
LISTED = 100
"""Most licenses and sources of which the report counts the records each; some collections state the address of each image as its source."""
Embed = Callable[[ImageStore, Sequence[str]], np.ndarray]
"""Unit vectors of stored images, float32 (n, d), as :meth:`cm3leon.models.clip.Encoder.encode_refs` makes them."""


class ValidationError(UserError):
    """The data does not pass; the message says which rules are broken, by which records, and what to change."""


def run(config: Config) -> dict[str, float]:
    """Validate ``data/raw``; returns how many records were read, accepted and rejected.

    Raises:
        ValidationError: if too many records are rejected, none is accepted, or an expectation fails. ``rejected.parquet``, ``report.json``,
            the Data Docs and the data report are written first.
        ConfigError: if images are to be compared by embeddings and the encoder cannot be loaded; no image is read before.
    """
    with runs.stage_run("validate", config) as stage:
        stage.log_dataset(paths.RAW, "raw")
        paths.DATA_REPORT.unlink(missing_ok=True)
        try:
            directories, embed = (paths.RAW, paths.VALIDATED, paths.DATA_DOCS), _embed(config)
            report = validate(*directories, config.validate_, config.seed, paths.EXCLUDED, paths.LAST_ACCEPTED, embed)
        finally:
            if paths.DATA_REPORT.is_file():
                stage.log_artifact(paths.DATA_REPORT)
        metrics = {name: float(report[name]) for name in ("read", "accepted", "rejected")}
        stage.log_metrics({f"validate/{name}": value for name, value in metrics.items()})
        stage.log_artifact(paths.VALIDATED / "report.json")
    _print(report)
    return metrics


def _embed(config: Config) -> Embed | None:
    """The pretrained encoder's embedding of images if they are to be compared by it. Else nothing of it is imported."""
    if config.validate_.near_duplicate_similarity is None:
        return None
    from cm3leon.models.clip import Encoder
    from cm3leon.utils.device import default_device

    section = config.encoder
    assert section.pretrained_model and section.pretrained_weights
    return Encoder.pretrained(section.pretrained_model, section.pretrained_weights).to(default_device()).encode_refs


def validate(
    raw: Path,
    output: Path,
    docs: Path,
    config: ValidateConfig,
    seed: int,
    excluded: Path | None = None,
    last: Path | None = None,
    embed: Embed | None = None,
) -> dict[str, Any]:
    """The stage without tracking, from directory ``raw`` to directory ``output``, with Data Docs and the data report in ``docs``.

    Args:
        excluded: directory with what to keep out (:mod:`cm3leon.data.excluded`); None: nothing.
        last: file with the summary of the last accepted manifest (:mod:`cm3leon.data.last_accepted`), with which this one is compared, and
            which it replaces if it is accepted; None: no comparison.
        embed: for ``config.near_duplicate_similarity``; not called where that is None.

    Returns:
        The content of ``report.json``.

    Raises:
        ValidationError: as :func:`run`.
    """
    # 1. Profile every image, and apply the rules.
    frame = read_manifest(raw)
    frame["licence"] = pd.Series([licenses.identifier_of(stated) or stated for stated in frame["licence"]], dtype=object)
    profiles = profile_images(ImageStore(raw), frame, config)
    findings = check_rows(frame, profiles, config, Excluded.read(excluded, config) if excluded else Excluded())
    frame["pixels"] = pd.Series([profile.pixels for profile in profiles], dtype=object)
    good = np.array([not found for found in findings], dtype=bool)
    frame["width"] = np.array([profile.width for profile in profiles], dtype=np.int32)
    frame["height"] = np.array([profile.height for profile in profiles], dtype=np.int32)
    report = _report(frame, findings, good)
    report["noted"] = sum(1 for profile, passed in zip(profiles, good, strict=True) if passed and profile.note)

    # 2. Quarantine. The files that later stages read are removed first, so that none trains on data that failed validation.
    output.mkdir(parents=True, exist_ok=True)
    for outdated in ("manifest.parquet", thumbnails.FILE):
        (output / outdated).unlink(missing_ok=True)
    _write_rejected(frame[~good], [found for found in findings if found], output / "rejected.parquet")
    problems = _gate_failures(report, frame, findings, config)

    # 3. Split and clean the accepted records, unless the error would be about too few of them.
    accepted = frame[good].reset_index(drop=True)
    notes = [profile.note for profile, passed in zip(profiles, good, strict=True) if passed]
    accepted["detail"] = pd.Series(notes, dtype=object)
    accepted["thumbnail"] = pd.Series([profile.thumbnail for profile, passed in zip(profiles, good, strict=True) if passed], dtype=object)
    accepted["near"] = np.arange(len(accepted))
    frames = {"counts": pd.DataFrame([{name: report[name] for name in ("read", "accepted", "rejected", "rejected_rate", "unaccounted")}])}
    if not problems:
        accepted["near"] = near = _near_duplicates(ImageStore(raw), accepted, config, embed)
        components, report["parts"] = _components(frame, near, good)
        try:
            stated = accepted["split"].tolist()
            fractions = (config.val_fraction, config.test_fraction)
            held_out = splits.stated_by_copies(frame)[good].tolist()
            accepted["split"] = splits.assign_splits(accepted["id"].tolist(), components, held_out, seed, *fractions)
        except UserError as error:
            problems = str(error)
        else:
            report["splits"] = {name: int((accepted["split"] == name).sum()) for name in SPLITS}
            stated_by_some = set(filter(None, held_out))  # records are drawn for the other splits
            report["parts"]["moved_from_stated_split"] = sum(
                name is not None and name != own and own in stated_by_some for name, own in zip(stated, accepted["split"], strict=True)
            )
            accepted, report["cleaned"] = _clean(accepted, frame, good)
            frames["accepted_rows"] = expectations.flat_frame(accepted, components)

    # 4. The Great Expectations gate, a second look at the result by other code, and the report.
    failed = expectations.check(frames, config, docs)
    rejected = {f"rejected: {reason}": count for reason, count in report["reasons"].items()}
    data_docs.add_counts(docs, "Rows", {name: report[name] for name in ("read", "accepted", "rejected")} | rejected, data_report.FILE)
    (output / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if failed and not problems:
        problems = f"expectations failed (see {docs / 'index.html'}):\n  " + "\n  ".join(failed)
    result = data_report.Found(report, accepted, frame[~good], [found for found in findings if found], problems)
    now, before = last_accepted.summary_of(accepted), last_accepted.read(last) if last else None
    data_report.write(docs / data_report.FILE, result, now, before, ImageStore(raw), config, datetime.now(UTC))
    if problems:
        raise ValidationError(problems)

    # 5. What later stages read.
    thumbnails.write_thumbnails(output, accepted["id"].tolist(), accepted["thumbnail"].tolist())
    write_manifest(output / "manifest.parquet", accepted, VALIDATED_SCHEMA)
    if last:
        last_accepted.write(last, now)
    return report


def _write_rejected(rejected: pd.DataFrame, findings: list[Findings], path: Path) -> None:
    reasons = [[reason for reason, _ in found] for found in findings]
    details = ["; ".join(dict.fromkeys(detail for _, detail in found if detail)) for found in findings]
    told = rejected.assign(
        reasons=pd.Series(reasons, rejected.index, dtype=object), detail=pd.Series(details, rejected.index, dtype=object)
    )
    write_manifest(path, told, REJECTED_SCHEMA)


def _report(frame: pd.DataFrame, findings: list[Findings], good: np.ndarray) -> dict[str, Any]:
    reasons = Counter(reason for found in findings for reason, _ in found)
    read, accepted, rejected = len(frame), int(good.sum()), sum(1 for found in findings if found)
    assert accepted + rejected == read, (accepted, rejected, read)

    return {
        "read": read,
        "accepted": accepted,
        "rejected": rejected,
        "rejected_rate": round(rejected / max(read, 1), 6),
        "unaccounted": read - accepted - rejected,
        "reasons": dict(sorted(reasons.items())),
        "licences": _counts(frame["licence"], good),
        "obligations": {
            str(name): {"accepted": len(rows), "asks": licenses.obligation(str(name)), "examples": rows["origin"].tolist()[:EXAMPLES]}
            for name, rows in frame[good].groupby("licence")
        },
        "sources": _counts(frame["source"], good),
    }


def _counts(values: pd.Series, good: np.ndarray) -> dict[str, dict[str, int]]:
    """How many records that were read, and that are accepted, have each value; those beyond the most frequent ones are counted together."""
    names = [value or "none stated" for value in values]
    totals = Counter(names)
    listed = set(sorted(totals, key=lambda name: (-totals[name], name))[:LISTED])
    others = f"{len(totals) - len(listed):,} others"
    names = [name if name in listed else others for name in names]
    return {"read": dict(sorted(Counter(names).items())), "accepted": dict(sorted(Counter(compress(names, good)).items()))}


def _gate_failures(report: dict[str, Any], frame: pd.DataFrame, findings: list[Findings], config: ValidateConfig) -> str:
    """The error's message if too many records are rejected, or none is accepted; else empty."""
    rejected, read = report["rejected"], report["read"]
    if rejected <= config.max_rejected_rate * read and report["accepted"]:
        return ""
    examples: dict[str, list[str]] = {}
    for origin, found in zip(frame["origin"], findings, strict=True):
        for reason, detail in found:
            listed = examples.setdefault(reason, [])
            if len(listed) < EXAMPLES:
                listed.append(f"{origin}: {detail}" if detail else origin)
    none = "" if report["accepted"] else "No record is accepted: "
    rate, limit = f"{report['rejected_rate']:.1%}", f"{config.max_rejected_rate:.1%}"
    lines = [f"{none}{rejected} of {read} records rejected ({rate}); validate.max_rejected_rate allows {limit}."]
    for reason, count in sorted(report["reasons"].items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"  {reason}: {count} records ({RULES.get(reason, 'found by the source')})")
        lines += [f"    {example}" for example in examples[reason]]
    lines.append("Correct the records, change the parameter that a rule names, or raise validate.max_rejected_rate in params.yaml.")
    lines.append("All rejected records with their reasons are in data/validated/rejected.parquet.")
    lines.append(f"Examples of each, with pictures: {paths.DATA_REPORT}")
    return "\n".join(lines)


def _near_duplicates(store: ImageStore, accepted: pd.DataFrame, config: ValidateConfig, embed: Embed | None) -> np.ndarray:
    """The number of each accepted record's group of near-duplicates: by thumbnails, hashes and embeddings."""
    near = near_duplicate_groups(thumbnails.stack(accepted["thumbnail"].tolist()), Likeness.of(config))
    if config.near_duplicate_similarity is None:
        return near
    assert embed is not None
    similar = similar_groups(embed(store, accepted["image"].tolist()), config.near_duplicate_similarity)
    rows = np.arange(len(near))
    return linked_rows([(rows, near), (rows, similar)], len(near))


def _components(frame: pd.DataFrame, near: np.ndarray, good: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Component number of each accepted record, and counts.

    Rejected records take part: two accepted edits of a rejected original are still linked through it.

    Args:
        near: group of near-duplicates of each accepted record.
        good: which records of ``frame`` are accepted.
    """
    components = linked_rows([*splits.links_of(frame), (np.flatnonzero(good), near)], len(frame))[good]
    sizes = np.bincount(np.unique(components, return_inverse=True)[1])
    in_near = np.bincount(near)[near] > 1
    return components, {"count": len(sizes), "largest": int(sizes.max()), "rows_with_near_duplicates": int(in_near.sum())}


def _clean(accepted: pd.DataFrame, frame: pd.DataFrame, good: np.ndarray) -> tuple[pd.DataFrame, dict[str, int]]:
    """Remove blank captions and the blanks around captions; resolve edits of rejected records. Returns counts too.

    An ``edited_from`` that names a rejected record becomes the id of the accepted record with the same pixels (a duplicate's original),
    else null; the edit itself stays.
    """
    captions = [[text.strip() for text in texts if text and not is_blank(text)] for texts in accepted["captions"]]
    blank = sum(map(len, accepted["captions"])) - sum(map(len, captions))
    kept = set(accepted["id"])
    by_pixels = dict(zip(accepted["pixels"], accepted["id"], strict=True))
    accepted_copy = {record_id: by_pixels.get(pixels) for record_id, pixels in zip(frame["id"][~good], frame["pixels"][~good], strict=True)}
    originals: list[str | None] = []
    lost = 0
    for record_id, original in zip(accepted["id"], accepted["edited_from"], strict=True):
        found = original if original in kept else accepted_copy.get(original)
        found = None if found == record_id else found  # no record is an edit of itself
        lost += original is not None and found is None
        originals.append(found)
    cleaned = accepted.assign(captions=pd.Series(captions, dtype=object), edited_from=pd.Series(originals, dtype=object))
    return cleaned, {"blank_captions_removed": blank, "edits_without_original": lost}


def _print(report: dict[str, Any]) -> None:
    table = Table("metric", "records", title=f"validate: {paths.VALIDATED}")
    for name in ("read", "accepted", "rejected"):
        table.add_row(name, f"{report[name]:,}")
    if report["noted"]:
        table.add_row("accepted, with a note in detail", f"{report['noted']:,}")
    for title in ("reasons", "splits", "parts", "cleaned"):
        for name, count in report[title].items():
            table.add_row(f"{title}: {name}", f"{count:,}")
    console = Console()
    console.print(table)
    console.print(f"data report: {paths.DATA_REPORT}\nData Docs:   {paths.DATA_DOCS / 'index.html'}", soft_wrap=True, highlight=False)
