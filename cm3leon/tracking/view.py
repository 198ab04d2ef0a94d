"""A saved view of MLflow's page of runs: the runs of the pipeline with their scores, and what differs between those that are chosen.

MLflow keeps the views that users share as tags of the experiment: JSON, deflated. Without one its list shows no score, its charts are in
alphabetical order, and each image has all parameters above it.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

KEY = "scores"
"""The view's name in addresses."""
NOTE_TAG = "mlflow.note.content"
"""The description of a run or experiment, Markdown."""
RUN_NAME = "attributes.`Run Name`"
NAME_WIDTH = 380
"""Pixels of the column of names."""
SECTIONS = {"differences": (1, 480), "images": (1, 800), "scores": (3, 260)}
"""Section of charts -> columns, and height of a chart in pixels."""
TRAINING = "workflowType=machine_learning"
"""In an address: MLflow's pages without what is for applications of language models."""


def spaced(table: str) -> str:
    """A markdown table for a description: MLflow draws columns without space between them."""
    return table.replace(" | ", "&ensp; | ")


def run_page(experiment_id: str, run_id: str, artifact: str = "") -> str:
    """The address of a run's page, or of an artifact on it, relative to MLflow's."""
    return f"#/experiments/{experiment_id}/runs/{run_id}{f'/artifacts/{artifact}' if artifact else ''}?{TRAINING}"


def write_view(client: Any, experiment_id: str, metrics: Sequence[str], images: Sequence[str], tag: str, baseline: str) -> None:
    """Save the view, and link to it from the experiment's description, unless a person has written one.

    Args:
        metrics: those with a column and a chart, in this order.
        images: keys of the images that are shown side by side, at least two: MLflow shows those of a single key small.
        tag: one with a column.
        baseline: run with which others are compared, if it is visible; "" leaves it to MLflow.
    """
    found = client.get_experiment(experiment_id).tags
    text = json.dumps(_view(metrics, images, tag, baseline))
    wanted = {f"mlflow.sharedViewState.{KEY}": f"deflate;{base64.b64encode(zlib.compress(text.encode())).decode()}"}
    if NOTE_TAG not in found:
        page = f"#/experiments/{experiment_id}/runs?{TRAINING}&viewStateShareKey={KEY}"
        wanted[NOTE_TAG] = f"Finished runs of the pipeline: [scores]({page}) · [differences and samples]({page}&compareRunsMode=CHART)"
    for name, value in wanted.items():
        if found.get(name) != value:
            client.set_experiment_tag(experiment_id, name, value)


def _view(metrics: Sequence[str], images: Sequence[str], tag: str, baseline: str) -> dict[str, Any]:
    difference = _chart("DIFFERENCE", "differences", 0, chartName="What differs", compareGroups=["Parameters", "Model metrics"])
    difference |= {"showChangeFromBaseline": True, "showDifferencesOnly": True, "baselineColumnUuid": baseline}
    sheets = _chart("IMAGE", "images", 0, imageKeys=list(images), step=0, showRunParams=False)
    bars = [_chart("BAR", "scores", i, metricKey=name, displayName=name.partition("/")[2]) for i, name in enumerate(metrics)]
    return {
        "searchFilter": "tags.stage = 'pipeline' and attributes.status = 'FINISHED'",  # one without sheets stops MLflow's comparison
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "selectedColumns": [*(f"metrics.`{name}`" for name in metrics), f"tags.`{tag}`"],
        "columnOrder": [RUN_NAME, *(f"metrics.`{name}`" for name in metrics)],
        "columnWidths": {RUN_NAME: NAME_WIDTH, **{f"metrics.`{name}`": 30 + 7 * len(name) for name in metrics}},
        "compareRunCharts": [difference, sheets, *bars],
        "compareRunSections": [_section(name, *size) for name, size in SECTIONS.items()],
        "isAccordionReordered": True,
    }


def _section(name: str, columns: int, height: int) -> dict[str, Any]:
    shown = {"uuid": name, "name": name, "columns": columns, "cardHeight": height, "display": True}
    return {**shown, "isReordered": True, "deleted": False, "isGenerated": False}


def _chart(kind: str, section: str, number: int, **settings: Any) -> dict[str, Any]:
    own = {"uuid": f"{section}-{number}", "type": kind, "metricSectionId": section}
    return {**own, "runsCountToCompare": 10, "deleted": False, "isGenerated": False, **settings}
