"""The release of a registered version: model card, bill of materials, and one HTML page with all that a person needs to approve it.

They are artifacts of the version's run, under ``release/``:

    facts.json         what the card says of model and data
    model-card.md      intended use, limits, data by license, evaluation with baselines and intervals, lineage
    release.html       the card, sheets of samples, the gate's report, the ledger of this version, the packages; one file
    sbom.cdx.json      the installed packages, CycloneDX 1.6

:func:`publish` writes them anew whenever the version's state changes, and gives the version a description for MLflow's page.
"""

from __future__ import annotations

import html
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from cm3leon.evaluation.record import Record
from cm3leon.registry import ledger
from cm3leon.registry.bundle import LINEAGE, TRAINING_DATA
from cm3leon.registry.model_card import description, model_card
from cm3leon.tracking.overview import ordered_sheets
from cm3leon.utils.html import from_markdown, image_tag, page

if TYPE_CHECKING:
    from mlflow import MlflowClient

FOLDER = "release"


def facts(bundle: Path) -> dict[str, Any]:
    """What the card says of a bundle: parameters, image size, tasks, and the training data by license."""
    from safetensors import safe_open

    with safe_open(bundle / "model.safetensors", framework="np") as file:
        parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    training = bundle / "training.json"
    data = pd.read_parquet(bundle / TRAINING_DATA)
    return {
        "parameters": parameters,
        "image_size": json.loads((bundle / "image_tokenizer" / "config.json").read_text())["image_size"],
        "tasks": json.loads(training.read_text())["tasks"] if training.is_file() else [],
        "documents": len(data),
        "licenses": [
            {
                "license": str(name),
                "documents": len(rows),
                "attributions": int(rows["attribution"].nunique()),
                "sources": sorted(rows["source"].dropna().unique().tolist())[:20],
            }
            for name, rows in data.groupby("licence")
        ],
    }


@cache
def bill_of_materials() -> dict[str, Any]:
    """The installed packages in CycloneDX 1.6 (cyclonedx.org/docs/1.6/json); read once a process, as there are hundreds of files."""
    packages = {str(package["name"]): package for found in metadata.distributions() if "name" in (package := found.metadata.json)}
    components = [
        {
            "type": "library",
            "name": name,
            "version": package["version"],
            "purl": f"pkg:pypi/{name.lower().replace('_', '-')}@{package['version']}",
            **({"licenses": [{"license": {"name": license_name}}]} if (license_name := _license(package)) else {}),
        }
        for name, package in sorted(packages.items(), key=lambda item: item[0].lower())
    ]
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": components}


def _license(package: Mapping[str, Any]) -> str | None:
    """A package's license as its metadata state it, if that is short."""
    stated = str(package.get("license_expression") or package.get("license") or "").strip()
    if not stated or len(stated) > 60 or "\n" in stated:  # some repeat the whole text
        classifiers = [text.rpartition(" :: ")[2] for text in package.get("classifier", []) if text.startswith("License ::")]
        return ", ".join(classifiers) or None
    return stated


# --- the page ---------------------------------------------------------------------------------------------------------


def release_page(
    number: str,
    state: str,
    card: str,
    gate_report: str,
    entries: Sequence[ledger.Entry],
    sheets: Mapping[str, bytes],
    packages: Mapping[str, Any],
) -> str:
    """The page of a release.

    Args:
        state: in a sentence.
        card, gate_report: markdown; no report: the version has not been compared yet.
        entries: of the ledger that concern this version, newest first.
        sheets: PNG by name.
        packages: the bill of materials.
    """
    history = [
        f"<tr><td>{entry.time:%Y-%m-%d %H:%M} UTC</td><td>{html.escape(entry.who)}</td><td>{html.escape(entry.sentence)}</td>"
        f"<td>{html.escape(entry.verdict)}</td><td>{html.escape(entry.reason)}</td></tr>"
        for entry in entries
    ]
    listed = [f"<tr><td>{html.escape(item['name'])}</td><td>{html.escape(item['version'])}</td><td>"
              f"{html.escape(item['licenses'][0]['license']['name'] if 'licenses' in item else '')}</td></tr>"
              for item in packages["components"]]  # fmt: skip
    parts = [
        f'<p class="state">{html.escape(state)}</p>',
        from_markdown(card),
        "<h2>Samples</h2>",
        *(f"<h3>{html.escape(name.replace('_', ' '))}</h3>{image_tag(png, f'sheet {name}')}" for name, png in sheets.items()),
        from_markdown(gate_report or "## Gate\n\nNot compared yet."),
        "<h2>Approval</h2><table><tr><th>time</th><th>who</th><th>what</th><th>gate</th><th>reason</th></tr>",
        *history,
        f"</table><h2>Software</h2><details><summary>{len(listed)} packages</summary><table>",
        "<tr><th>package</th><th>version</th><th>license</th></tr>",
        *listed,
        "</table></details>",
    ]
    return page(f"cm3leon, version {number}", "\n".join(parts))


def sheets_page(gate_report: str, sheets: Mapping[str, bytes]) -> str:
    """The gate's report, and sheets of samples of the same prompts below each other, by the version's name."""
    shown = "".join(f"<h3>{html.escape(name)}</h3>{image_tag(png, f'samples of {name}')}" for name, png in sheets.items())
    return page("gate", f"{from_markdown(gate_report)}<h2>Samples of the same prompts</h2>{shown}")


# --- writing it -------------------------------------------------------------------------------------------------------


def log_facts(client: MlflowClient, run_id: str, bundle: Path) -> None:
    """Log what does not change after registration: the facts and the bill of materials."""
    client.log_text(run_id, json.dumps(facts(bundle), indent=2) + "\n", f"{FOLDER}/facts.json")
    client.log_text(run_id, json.dumps(bill_of_materials(), indent=1) + "\n", f"{FOLDER}/sbom.cdx.json")


def publish(client: MlflowClient, name: str, number: str, run_id: str, aliases: Sequence[str], record: Record | None = None) -> None:
    """Write card, page and description of a version from what its run and the ledger hold.

    A version that an earlier release of this package registered has no facts, and keeps what it has.

    Args:
        record: the version's evaluation record, if the caller has it.
    """
    if not client.list_artifacts(run_id, FOLDER):
        return
    entries = [entry for entry in ledger.read(client) if number in (entry.version, entry.champion)]
    state = state_of(number, aliases, entries)
    with tempfile.TemporaryDirectory() as folder:

        def fetch(path: str) -> Path:
            return Path(client.download_artifacts(run_id, path, folder))

        found, packages = (json.loads(fetch(f"{FOLDER}/{file}").read_text()) for file in ("facts.json", "sbom.cdx.json"))
        evaluation = fetch("evaluation")
        record = record or Record.read(evaluation)
        compared = any(file.path == "gate.md" for file in client.list_artifacts(run_id))
        report = fetch("gate.md").read_text() if compared else ""
        card = model_card(number, found, record, json.loads(fetch(LINEAGE).read_text()))
        sheets = {file.stem: file.read_bytes() for file in ordered_sheets(evaluation)}
        whole = release_page(number, state, card, report, entries, sheets, packages)
    client.log_text(run_id, card, f"{FOLDER}/model-card.md")
    client.log_text(run_id, whole, f"{FOLDER}/release.html")
    client.update_model_version(name, number, description(number, found, record, state))


def state_of(number: str, aliases: Sequence[str], entries: Sequence[ledger.Entry]) -> str:
    """The state of a version in a sentence."""
    shown = f"Version {number}: {', '.join(aliases)}." if aliases else f"Version {number}."
    if not entries:
        return f"{shown} Not compared by the gate yet."
    newest = entries[0]
    return f"{shown} {newest.time:%Y-%m-%d %H:%M} UTC, {newest.who}: {newest.sentence}."
