"""The model card of a version: intended use, limits, training data by license, evaluation with baselines and ceilings, lineage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cm3leon.data.licenses import TERMS, obligation
from cm3leon.evaluation.calibration import BASELINES, CEILINGS, calibrations_of, lower_is_better
from cm3leon.evaluation.record import Record
from cm3leon.registry.bundle import TRAINING_DATA
from cm3leon.tracking.overview import HEADLINE
from cm3leon.tracking.view import spaced

MAX_DESCRIPTION = 4900
"""MLflow's store keeps 5,000 characters of a version's description."""


def scores_table(record: Record) -> Iterator[str]:
    """Lines of a markdown table: each headline score with interval, baselines and ceilings."""
    yield "| score | value | 95 % interval | baselines | ceilings |"
    yield "|---|---:|---|---|---|"
    for name in headline_scores(record):
        low, high = record.intervals.get(name, (float("nan"), float("nan")))
        interval = f"{low:.3g} to {high:.3g}" if name in record.intervals else ""
        cells = [", ".join(f"{end.replace('_', ' ')} {value:.3g}" for end, value in calibrations_of(record.calibration, name, ends).items())
                 for ends in (BASELINES, CEILINGS)]  # fmt: skip
        yield f"| {name} | {record.scores[name]:.4g} | {interval} | {cells[0]} | {cells[1]} |"


def headline_scores(record: Record) -> list[str]:
    """Names of the scores that are calibrated, the main ones first; the others are breakdowns of them, or counts."""
    ordered = sorted(record.scores, key=lambda name: (HEADLINE.index(name) if name in HEADLINE else len(HEADLINE), name))
    return [name for name in ordered if calibrations_of(record.calibration, name, (*BASELINES, *CEILINGS))]


def limits(record: Record) -> Iterator[str]:
    """What the evaluation says the model cannot do: scores whose interval reaches down to a baseline, where higher is better."""
    for name in headline_scores(record):
        if name not in record.intervals or lower_is_better(name):
            continue
        low, _ = record.intervals[name]
        below = [end.replace("_", " ") for end, value in calibrations_of(record.calibration, name, BASELINES).items() if low <= value]
        if below:
            yield f"{name}: not shown to be better than the baseline ({', '.join(below)})"


def flags(licenses: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """What concerns whoever uses or passes on the model, as markdown: licenses that forbid commercial use, or ask for the same license."""
    for name, what in (("non_commercial", "allow no commercial use"), ("share_alike", "ask for the same license of changed works")):
        found = [row for row in licenses if getattr(TERMS.get(row["license"]), name, False)]
        if found:
            count, names = sum(row["documents"] for row in found), ", ".join(row["license"] for row in found)
            yield from ("", f"**{count:,} documents {what}** ({names}). Whether this binds the model is for a lawyer to say.")


def model_card(number: str, found: Mapping[str, Any], record: Record, lineage: Mapping[str, Any]) -> str:
    """The model card of a version, as markdown."""
    lines = [
        f"# cm3leon, version {number}",
        "",
        f"A retrieval-augmented decoder of {found['parameters']:,} parameters over text and image tokens.",
        f"It generates and reads images of {found['image_size']} pixels.",
        "",
        *card_sections(found, record, lineage),
    ]
    return "\n".join(lines) + "\n"


def card_sections(found: Mapping[str, Any], record: Record, lineage: Mapping[str, Any]) -> list[str]:
    """The lines of a model card's sections: intended use, limits, training data, evaluation, lineage."""
    prompts = record.contract.get("counts", {}).get("prompts", "an unknown number of")
    licenses = [
        (row["license"], f"{row['documents']:,}", f"{row['attributions']:,}", ", ".join(row["sources"]), obligation(row["license"]))
        for row in found["licenses"]
    ]
    return [
        "## Intended use",
        "",
        f"Tasks it was tuned for: {', '.join(found['tasks']) or 'none, it was pretrained only'}; inpainting is learned in pretraining.",
        "It is meant for prompts and images like those of its training data, for which it was evaluated.",
        "Other uses need an evaluation of their own. Generated images show no real events, and answers may be wrong.",
        "",
        "## Limits",
        "",
        *(f"- {text}" for text in limits(record)),
        f"- Evaluated on {prompts} prompts of the held-out split of the same collection: nothing is known of other collections.",
        "- Retrieval may bring words and images of single training documents into a result. Its metadata name them with their licenses.",
        "",
        "## Training data",
        "",
        f"{found['documents']:,} documents. Each is listed with license, attribution and source in `{TRAINING_DATA}` of the bundle.",
        "",
        "| license | documents | attributions | sources | obligation |",
        "|---|---:|---:|---|---|",
        *(f"| {' | '.join(cells)} |" for cells in licenses),
        *flags(found["licenses"]),
        "",
        "## Evaluation",
        "",
        *scores_table(record),
        "",
        "## Lineage",
        "",
        *(f"- {name.replace('_', ' ')}: `{value}`" for name, value in _flat(lineage)),
    ]


def _flat(lineage: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in lineage.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}, {key}", str(item)) for key, item in value.items())
        else:
            yield name, str(value)


def description(number: str, found: Mapping[str, Any], record: Record, state: str) -> str:
    """The description of a version on MLflow's page."""
    licenses = ", ".join(f"{row['license']} ({row['documents']:,})" for row in found["licenses"])
    lines = [f"**{state}**", "", *map(spaced, scores_table(record)), "", f"Training data: {found['documents']:,} documents; {licenses}.",
             "", "The whole release is one page: artifact `release/release.html` of the source run."]  # fmt: skip
    text = "\n".join(lines)
    return text if len(text) <= MAX_DESCRIPTION else text[: MAX_DESCRIPTION - 2] + " …"
