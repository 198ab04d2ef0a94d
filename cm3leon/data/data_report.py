"""The data report: one page that says what ``validate`` has found, for the person who owns the collection.

The verdict comes first, then counts, what was rejected with pictures and what to do, what the accepted records are like, their licenses,
duplicates, and what has changed since the last accepted manifest. The page loads nothing, and is the same for the same data but for the
line that says when. It is written also when the data does not pass.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cm3leon.config.schema import ValidateConfig
from cm3leon.data import thumbnails
from cm3leon.data.bounded import bounded_map
from cm3leon.data.distances import chance_of_distance, distance, share_distance
from cm3leon.data.images import ImageError, decode
from cm3leon.data.last_accepted import changes_between
from cm3leon.data.manifest import ImageStore, first_caption, records_of
from cm3leon.data.validation import RULES, Findings
from cm3leon.sequence.tasks import CONDITIONS, TASK_COLUMNS, TASKS, counts_of_tasks
from cm3leon.utils.html import image_tag, page
from cm3leon.utils.svg import BEFORE, histogram

FILE = "data_report.html"
EXAMPLES, PAIRS, NOTES = 3, 4, 5
"""Most records shown of a reason, pairs of each kind of duplicates, and notes."""
SIDE = 128
"""Longer side of a picture on the page, pixels."""
SHOWN_CHARACTERS = 200
"""Of a text of the collection."""
STYLE = f"""
.state.stopped {{ background: #fdeeee; border-color: #b02a37 }}
.cards {{ display: flex; flex-wrap: wrap; gap: .8rem; margin: .5rem 0 1.2rem }}
.card {{ box-sizing: border-box; width: 19.8rem; padding: .6rem; border: 1px solid #d5dbe3; border-radius: 6px }}
.card {{ font-size: 13px; overflow-wrap: anywhere }}
.card img {{ display: block; image-rendering: auto; margin: 0 0 .4rem; background: #f2f5f9 }}
.pair {{ display: flex; gap: .6rem }}
.pair div {{ width: 50% }}
.none {{ box-sizing: border-box; width: {SIDE}px; max-width: 100%; height: 3rem; margin: 0 0 .4rem; padding: .3rem }}
.none {{ background: #f2f5f9; color: #5a6573 }}
.plots {{ display: flex; flex-wrap: wrap; gap: 1.5rem }}
figure {{ margin: .5rem 0 }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px }}
"""


@dataclass(frozen=True)
class Found:
    """What ``validate`` has found.

    Attributes:
        report: the content of ``report.json``.
        accepted: the accepted records, with ``width``, ``height``, ``pixels``, ``thumbnail`` and ``near``, the number of the group of
            near-duplicates that each is in.
        rejected: the others, with ``pixels``.
        findings: the rules that each rejected record breaks.
        problem: the message of the error with which the stage ends; "" if the data passes.
    """

    report: dict[str, Any]
    accepted: pd.DataFrame
    rejected: pd.DataFrame
    findings: list[Findings]
    problem: str


def write(
    file: Path, found: Found, now: pd.DataFrame, before: pd.DataFrame | None, store: ImageStore, config: ValidateConfig, when: datetime
) -> None:
    """Write the page.

    Args:
        now: summary of the accepted records (:mod:`cm3leon.data.last_accepted`).
        before: that of the last accepted manifest; None if there is none.
        store: has the images.
        config: limits what reading a picture may take, as in the stage itself.
    """
    examples, copies, alike = _examples(found), _copies(found), _near_pairs(found.accepted)
    records = [record for listed in examples.values() for record, _ in listed] + [record for pair in copies + alike for record in pair]
    pictures = _pictures(store, records, config)
    body = [
        f"<h1>Data report</h1>\n<p>of {when:%Y-%m-%d %H:%M} UTC</p>",
        _verdict(found),
        _counts(found),
        "<h2>What was rejected, and what to do</h2>",
        *(_reason(reason, found.report["reasons"][reason], listed, pictures) for reason, listed in examples.items()),
        "" if examples else "<p>No record.</p>",
        "<h2>What the accepted records are like</h2>",
        _plots(now, before),
        _tasks(found.accepted),
        "<h2>Licenses of the accepted records</h2>",
        _licenses(found.report["obligations"]),
        "<h2>Duplicates</h2>",
        _pairs(found, copies, alike, pictures),
        "<h2>What has changed since the last accepted manifest</h2>",
        _changes(before, now),
    ]
    file.write_text(page("Data report", "\n".join(filter(None, body)), STYLE), encoding="utf-8")


# --- verdict and counts ----------------------------------------------------------------------------------------------


def _verdict(found: Found) -> str:
    read, accepted = found.report["read"], found.report["accepted"]
    if not found.problem:
        return (
            f'<p class="state"><b>Passed: {accepted:,} of {read:,} records are accepted.</b> Later stages train and evaluate on them.</p>'
        )
    first, *rest = found.problem.splitlines()
    whole = f"<details><summary>The whole message</summary><pre>{escape(found.problem)}</pre></details>" if rest else ""
    advice = "Correct what is listed below, change the parameter that a rule names, or raise <code>validate.max_rejected_rate</code>."
    told = f"<b>Stopped: {escape(first)}</b> Nothing is passed on to later stages. {advice if found.report['rejected'] and rest else ''}"
    return f'<div class="state stopped">{told}</div>{whole}'


def _counts(found: Found) -> str:
    report = found.report
    rows = {name: report[name] for name in ("read", "accepted", "rejected")}
    rows |= {f"rejected as {reason}": count for reason, count in _by_count(report["reasons"])}
    rows |= {f"accepted, in split {name}": count for name, count in report.get("splits", {}).items()}
    if report["noted"]:
        rows["accepted, but with a note of what had to be guessed"] = report["noted"]
    several = "<p>A record that breaks several rules counts as each.</p>" if sum(report["reasons"].values()) > report["rejected"] else ""
    by_source = [(name, count, report["sources"]["accepted"].get(name, 0)) for name, count in sorted(report["sources"]["read"].items())]
    sources = _table(("source", "read", "accepted"), by_source) if len(by_source) > 1 else ""
    noted = records_of(found.accepted[found.accepted["detail"].astype(bool)].head(NOTES)) if report["noted"] else []
    notes = "".join(f"<li>{_text(record['origin'])}: {_text(record['detail'])}</li>" for record in noted)
    return _table(("records", "count"), rows.items()) + several + sources + (f"<p>Notes, for example:</p><ul>{notes}</ul>" if notes else "")


def tasks_allowed(rows: Iterable[Mapping[str, Any]]) -> tuple[dict[str, int], dict[str, int]]:
    """Task -> the number of records that allow it; kind of condition images that no task uses -> the number of records that have it.

    Args:
        rows: records, with the kinds of their condition images as ``conditions``.
    """
    unused = Counter[str]()

    def used(row: Mapping[str, Any]) -> dict[str, Any]:
        unused.update(kind for kind in row["conditions"] if kind not in CONDITIONS)
        return {**row, "conditions": [kind for kind in row["conditions"] if kind in CONDITIONS]}

    return counts_of_tasks(map(used, rows)), dict(_by_count(unused))


def unused_kinds(unused: dict[str, int]) -> str:
    """A sentence about the kinds of condition images that no task uses; empty if there are none."""
    kinds = ", ".join(f"{kind} ({count:,})" for kind, count in unused.items())
    return f"Condition images that no task uses: {kinds}. Kinds that are used: {', '.join(CONDITIONS)}." if unused else ""


def _tasks(accepted: pd.DataFrame) -> str:
    records = records_of(accepted[list(TASK_COLUMNS)])
    counts, unused = tasks_allowed({**record, "conditions": [item["kind"] for item in record["conditions"]]} for record in records)
    missing = [name for name in TASKS if name not in counts]
    without = f"<p>No record has the columns of {', '.join(f'<code>{name}</code>' for name in missing)}.</p>" if missing else ""
    without += f"<p>{escape(unused_kinds(unused))}</p>" if unused else ""
    rows = [(name, count, ", ".join(TASKS[name].columns)) for name, count in counts.items()]
    return "<h3>Tasks that they allow</h3>" + _table(("task", "records", "columns that it needs"), rows) + without


def _licenses(obligations: dict[str, dict[str, Any]]) -> str:
    rows = [(name, item["accepted"], item["asks"], ", ".join(item["examples"])) for name, item in obligations.items()]
    return _table(("license", "records", "asks", "for example"), rows) if rows else "<p>No record is accepted.</p>"


# --- examples and pairs ----------------------------------------------------------------------------------------------

Example = tuple[dict[str, Any], str]
"""A record, and what is wrong with it."""
Pair = tuple[dict[str, Any], dict[str, Any]]


def _examples(found: Found) -> dict[str, list[Example]]:
    """The first records of each reason, the most frequent reason first."""
    listed: dict[str, list[Example]] = {reason: [] for reason, _ in _by_count(found.report["reasons"])}
    for row, findings in enumerate(found.findings):
        for reason, detail in findings:
            if len(listed[reason]) < EXAMPLES:
                listed[reason].append((_record(found.rejected, row), detail))
    return listed


def _record(records: pd.DataFrame, row: int) -> dict[str, Any]:
    return records_of(records.iloc[[row]])[0]


def _by_count(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _copies(found: Found) -> list[Pair]:
    """Accepted records and rejected ones with the same pixels."""
    copied = (row for row, findings in enumerate(found.findings) if any(reason == "duplicate" for reason, _ in findings))
    copies = [_record(found.rejected, row) for row in islice(copied, PAIRS)]
    originals = found.accepted[found.accepted["pixels"].isin([record["pixels"] for record in copies])]
    kept = {record["pixels"]: record for record in records_of(originals)}
    return [(kept[record["pixels"]], record) for record in copies]


def _near_pairs(accepted: pd.DataFrame) -> list[Pair]:
    """Of each group of near-duplicates the first record and the one least like it; the least alike pairs first."""
    rows = np.argsort(accepted["near"].to_numpy(), kind="stable")
    groups = np.split(rows, np.flatnonzero(np.diff(accepted["near"].to_numpy()[rows])) + 1) if len(rows) else []
    pairs: list[tuple[float, int, int]] = []
    for group in groups:
        if len(group) > 1:
            small = thumbnails.stack(accepted["thumbnail"].iloc[group].tolist()).astype(np.float32)
            apart = np.sqrt(((small - small[0]) ** 2).mean(axis=1))
            apart[0] = -1
            pairs.append((-float(apart.max()), int(group[0]), int(group[apart.argmax()])))
    chosen = sorted(pairs)[:PAIRS]
    return [(_record(accepted, one), _record(accepted, other)) for _, one, other in chosen]


def _pictures(store: ImageStore, records: Sequence[dict[str, Any]], config: ValidateConfig) -> dict[str, str]:
    """Image reference -> the small image as a tag, of those that the stage could read."""
    refs = list(dict.fromkeys(record["image"] for record in records if record["pixels"]))
    done = bounded_map(lambda ref: _small(store, ref, config.max_pixels), refs, config.workers, config.max_seconds, config.max_megabytes)
    return {ref: image_tag(item.result, "", "jpeg") for ref, item in zip(refs, done, strict=True) if item.result}


def _small(store: ImageStore, ref: str, max_pixels: int) -> bytes:
    try:
        image = decode(store.read(ref), max_pixels)
    except ImageError:  # it took less when it was read before
        return b""
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=85)
    return file.getvalue()


def _reason(reason: str, count: int, listed: list[Example], pictures: dict[str, str]) -> str:
    meaning, _, advice = RULES.get(reason, "found by the source").partition(": ")
    cards = "".join(f'<div class="card">{_shown(record, pictures)}<br>{_text(detail)}{_caption(record)}</div>' for record, detail in listed)
    told = f"<p>{_code(meaning[0].upper() + meaning[1:])}. {f'<b>What to do:</b> {_code(advice)}.' if advice else ''}</p>"
    more = f"<p>{count - len(listed):,} more are in <code>data/validated/rejected.parquet</code>.</p>" if count > len(listed) else ""
    return f'<h3><code>{escape(reason)}</code>: {_number(count, "record")}</h3>{told}<div class="cards">{cards}</div>{more}'


def _pairs(found: Found, copies: list[Pair], alike: list[Pair], pictures: dict[str, str]) -> str:
    def cards(pairs: list[Pair]) -> str:
        sides = [tuple(f"<div>{_shown(record, pictures)}{_caption(record)}</div>" for record in pair) for pair in pairs]
        return '<div class="cards">' + "".join(f'<div class="card pair">{one}{other}</div>' for one, other in sides) + "</div>"

    exact, near = found.report["reasons"].get("duplicate", 0), found.report.get("parts", {}).get("rows_with_near_duplicates", 0)
    same = f"Rejected because an earlier record has the same pixels: {_number(exact, 'record')}."
    nearly = (
        f"Accepted, but nearly the same as another one: {_number(near, 'record')}. Such records share a split, so that none is tested on "
        "what it was trained on. If records that differ enough are among them, lower <code>validate.near_duplicate_distance</code> or "
        "<code>near_duplicate_bits</code>, or raise <code>near_duplicate_similarity</code>."
    )
    copied = f"<p>{same}{' On the left what was kept:' if copies else ''}</p>{cards(copies) if copies else ''}"
    return copied + f"<p>{nearly}{' The least alike pairs:' if alike else ''}</p>{cards(alike) if alike else ''}"


def _shown(record: dict[str, Any], pictures: dict[str, str]) -> str:
    picture = pictures.get(record["image"] or "", '<div class="none">no picture can be shown</div>')
    return f"{picture}<b>{_text(record['origin'])}</b>"


def _caption(record: dict[str, Any]) -> str:
    caption = first_caption(record["captions"])
    return f"<br>“{_text(caption)}”" if caption else ""


# --- distributions and changes ---------------------------------------------------------------------------------------

MEASURED = {"width": "Width, pixels", "height": "Height, pixels", "caption_length": "First caption, characters"}
SHARES = {"licence": "licenses", "source": "sources"}


def _plots(now: pd.DataFrame, before: pd.DataFrame | None) -> str:
    if now.empty:
        return "<p>No record is accepted.</p>"
    figures = []
    for name, title in MEASURED.items():
        values, old = now[name].to_numpy(), None if before is None or before.empty else before[name].to_numpy()
        low, middle, high = (f"{value:,.0f}" for value in (values.min(), np.median(values), values.max()))
        told = f"all {low}" if low == high else f"{low} to {high}, median {middle}"
        drawn = "" if low == high and (old is None or (old == values[0]).all()) else histogram(values, title, old)
        figures.append(f"<figure><figcaption><b>{title}</b>: {told}</figcaption>{drawn}</figure>")
    legend = ""
    if before is not None and not before.empty:
        legend = (
            f'<p>Bars: these records. <span style="color:{BEFORE}">Line</span>: those of the last accepted manifest. Both as shares.</p>'
        )
    return f'<div class="plots">{"".join(figures)}</div>{legend}'


def _changes(before: pd.DataFrame | None, now: pd.DataFrame) -> str:
    if before is None:
        return "<p>None was accepted in this directory before.</p>"
    changes = changes_between(before, now)
    columns = ", ".join(f"{name} {count:,}" for name, count in changes.columns.items())
    said = (
        f"<p>Of {len(before):,} records then and {len(now):,} now: <b>{changes.added:,} added, {changes.removed:,} removed, "
        f"{changes.changed:,} changed</b>{f' ({columns})' if columns else ''}. An image that was replaced is one removed and one added.</p>"
    )
    if before.empty or now.empty:
        return said
    rows: list[tuple[object, ...]] = []
    chance = chance_of_distance(len(before), len(now))
    for name, title in MEASURED.items():
        apart = distance(before[name].to_numpy(), now[name].to_numpy())
        medians = (f"median {table[name].median():,.0f}" for table in (before, now))
        rows.append((title, *medians, f"{apart:.2f}", "differs more than chance explains" if apart > chance else "within chance"))
    for name, title in SHARES.items():
        old, new = (table[name].fillna("none stated") for table in (before, now))
        apart, shares = share_distance(old, new), [_shares(values) for values in (old, new)]
        rows.append((f"Shares of {title}", *shares, f"{apart:.2f}", f"{apart:.0%} of the records have moved" if apart else "the same"))
    head = ("property", "last accepted", "now", "distance", "")
    return said + _table(head, rows) + "<p>A distance of 0 means that nothing differs, 1 that nothing is common.</p>"


def _shares(values: pd.Series) -> str:
    """The most frequent values with their shares."""
    shares = values.value_counts(normalize=True)
    ordered = sorted(shares.items(), key=lambda item: (-item[1], str(item[0])))
    listed = ", ".join(f"{name} {share:.0%}" for name, share in ordered[:NOTES])
    return f"{listed} and {len(ordered) - NOTES} more" if len(ordered) > NOTES else listed


# --- pieces of a page ------------------------------------------------------------------------------------------------


def _text(text: object) -> str:
    """A text of the collection, which is shown and not obeyed; what it says of its direction ends with it."""
    shown = str(text)
    return f"<bdi>{escape(shown if len(shown) <= SHOWN_CHARACTERS else shown[:SHOWN_CHARACTERS] + ' …')}</bdi>"


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _code(text: str) -> str:
    """A rule's text in which names of parameters and columns stand out."""
    return re.sub(r"[a-z]+(?:[._][a-z_]+)+", r"<code>\g<0></code>", escape(text))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def cells(row: Sequence[object]) -> Iterator[str]:
        for value in row:
            yield f'<td class="number">{value:,}</td>' if isinstance(value, int) else f"<td>{_text(value)}</td>"

    lines = ["".join(f"<th>{escape(title)}</th>" for title in head), *("".join(cells(row)) for row in rows)]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
