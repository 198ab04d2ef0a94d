"""The drift check: is the new training data still of the kind that the champion was trained on? Asked between ``validate`` and training.

Both sides are seen through the champion's own encoder. A large shift is not an error by itself, but training on it costs hours, and the
champion's scores say little of it: past the limits of the section ``drift`` the run stops, and a person decides.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.data.manifest import ImageStore, read_manifest
from cm3leon.registry.bundle import TRAINING_DATA, VALIDATION
from cm3leon.registry.drift_page import drift_page
from cm3leon.registry.registry import (
    CHAMPION,
    MODEL_NAME,
    NotRegisteredError,
    Version,
    all_versions,
    bundle_file,
    fetch_bundle,
    holder,
)
from cm3leon.registry.shifts import Data, Duplicates, Shift, duplicates_of, features, shifts_between, verdict_on
from cm3leon.retrieval.index import MemoryBank, multimodal_records
from cm3leon.tracking import lineage
from cm3leon.tracking.runs import Run
from cm3leon.utils.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from cm3leon.models.clip import Encoder

REPORT = Path(".cache/drift.html")
MANIFEST = paths.VALIDATED / "manifest.parquet"
ACCEPTED_TAG = "accepted_drift"
"""Tag of a pipeline's run: the data that a person accepted, and the champion's version with which it was compared."""
ACCEPT = (
    "If the change is intended, run again with --accept-drift (make run ACCEPT_DRIFT=1, or the parameter accept_drift of a deployment), "
    "or raise the limits in params.yaml"
)


class DriftError(UserError):
    """The data has drifted past a limit."""


@dataclass(frozen=True)
class Drift:
    """All comparisons, and their page."""

    shifts: list[Shift]
    page: str

    def __str__(self) -> str:
        return verdict_on(self.shifts)

    @property
    def passed(self) -> bool:
        """False if a comparison is past its limit."""
        return all(shift.passed for shift in self.shifts)

    @property
    def values(self) -> dict[str, float]:
        """The comparisons that could be made, by name."""
        return {shift.name: shift.value for shift in self.shifts if shift.value is not None}

    def to_markdown(self) -> str:
        """The comparisons as a table."""
        lines = [f"**{self}**", "", "| comparison | value | limit | chance | |", "|---|---:|---:|---:|---|"]
        for shift in self.shifts:
            value = "" if shift.value is None else f"{shift.value:.3f}"
            lines.append(
                f"| {shift.explanation} | {value} | {shift.limit:g} | {shift.chance:.3f} | {'' if shift.passed else '**past the limit**'} |"
            )
        return "\n".join(lines) + "\n"

    def write(self, report: Path) -> None:
        """Write the page."""
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(self.page, encoding="utf-8")


# --- the check -------------------------------------------------------------------------------------------------------


def check_drift(config: Config, report: Path) -> str:
    """Measure the drift and write its page; returns a sentence.

    Raises:
        DriftError: past a limit.
    """
    try:
        drift = measure_drift(config)
    except NotRegisteredError:
        return "there is no champion yet whose data could be compared"
    drift.write(report)
    if not drift.passed:
        raise DriftError(f"the data has drifted: {drift}; see {report}")
    return str(drift)


@dataclass(frozen=True)
class Checked:
    """How the check of a pipeline's run ended.

    Attributes:
        message: in words.
        drift: what was measured; None if nothing needed to be, or nothing could be.
        stopped: nothing may be trained on this data unless a person accepts it.
    """

    message: str
    drift: Drift | None = None
    stopped: bool = False


def check_run(config: Config, run: Run, accept: bool = False) -> Checked:
    """Check the data of a pipeline's run, unless it is the champion's, or was accepted before. The page is logged to the run.

    Args:
        run: of the pipeline; without a reachable store no champion is known, and nothing is compared.
        accept: go on past the limits. Later runs on the same data go on too, as long as the champion is the same version.
    """
    if run.client is None:
        return Checked("not compared: without MLflow no champion is known")
    champion = holder(all_versions(run.client), CHAMPION)
    if champion is None:
        return Checked("there is no champion yet whose data could be compared")
    with MANIFEST.open("rb") as file:
        data = hashlib.file_digest(file, "md5").hexdigest()
    if data == _data_of(run.client, champion):
        return Checked(f"the data is that of the champion, version {champion}")
    tag = f"{data} against version {champion}"
    found = run.client.search_runs([str(run.experiment_id)], f"tags.{ACCEPTED_TAG} = '{tag}'", max_results=1)
    if found:
        return Checked(f"this data was accepted in the run {found[0].info.run_name}")
    checked = _measured(config, run, champion)
    if not (checked.stopped and accept):
        return checked
    run.set_tags({ACCEPTED_TAG: tag})
    return Checked(f"accepted: {checked.message}", checked.drift)


def _measured(config: Config, run: Run, champion: Version) -> Checked:
    try:
        drift = measure_drift(config)
    except (UserError, OSError, ValueError, RuntimeError, KeyError) as error:  # of a champion that an older version has made, for example
        return Checked(f"the data cannot be compared with that of the champion, version {champion} ({error})", stopped=True)
    drift.write(REPORT)
    run.log_artifact(REPORT, REPORT.stem)
    run.log_metrics({f"drift/{name}": value for name, value in drift.values.items()})
    if drift.passed:
        return Checked(str(drift), drift)
    return Checked(f"the data has drifted from that of the champion, version {champion}: {drift}; see {REPORT}", drift, stopped=True)


def _data_of(client: MlflowClient, version: Version) -> str | None:
    """The md5 of the validated manifest that a version was trained on; None if the version has no ``dvc.lock``."""
    try:
        return lineage.locked_md5(bundle_file(client, version.number, str(lineage.DVC_LOCK)), str(MANIFEST))
    except FileNotFoundError:
        return None


# --- the comparison --------------------------------------------------------------------------------------------------


def measure_drift(config: Config) -> Drift:
    """Compare the training split in ``data/validated`` with what the champion was trained on.

    Raises:
        NotRegisteredError: if there is no champion.
        ManifestError: if there is no validated data, or an image of it is missing.
    """
    from cm3leon.models.clip import Encoder  # torch, which a run that compares nothing does not wait for

    bundle = fetch_bundle(f"models:/{MODEL_NAME}@{CHAMPION}")
    old = champion_data(bundle, config.drift.sample, config.seed)
    encoder = Encoder.load(bundle / "encoder")  # on the CPU: a flow's process lives on next to the training, which wants the GPU's memory
    new = new_data(encoder, config.drift.sample, config.seed)
    shifts = shifts_between(config.drift, old, new, config.seed)
    return Drift(shifts, drift_page(shifts, old, new))


def champion_data(bundle: Path, sample: int, seed: int) -> Data:
    """The training data of a bundle. Its memory bank holds the embeddings.

    Args:
        sample: most documents whose embeddings are taken.
        seed: of their choice.
    """
    bank = MemoryBank.load(bundle / "memory_bank")
    listed = bundle / TRAINING_DATA
    documents = pd.read_parquet(listed) if listed.is_file() else bank.documents
    duplicates = _duplicates(bundle / VALIDATION)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(bank))[:sample])
    embeddings = features(bank.text[chosen], bank.image[chosen])
    return Data(documents["id"].tolist(), documents["licence"], _lengths(bank.documents), _sides(documents), duplicates, embeddings)


def new_data(encoder: Encoder, sample: int, seed: int, root: Path = Path()) -> Data:
    """The training split of the validated data.

    Args:
        encoder: sees a sample of the documents.
        sample: most documents of which it sees.
        seed: of their choice.
        root: directory of the project.
    """
    records = multimodal_records(read_manifest(root / paths.VALIDATED, "train"))
    chosen = records.iloc[np.sort(np.random.default_rng(seed).permutation(len(records))[:sample])]
    images = encoder.encode_refs(ImageStore(root / paths.RAW), chosen["image"].tolist())
    embeddings = features(encoder.encode_texts(chosen["caption"].tolist()), images)
    duplicates = _duplicates(root / paths.VALIDATED / "report.json")
    return Data(records["id"].tolist(), records["licence"], _lengths(records), _sides(records), duplicates, embeddings)


def _lengths(records: pd.DataFrame) -> np.ndarray:
    return records["caption"].str.len().to_numpy(dtype=float)


def _sides(records: pd.DataFrame) -> np.ndarray | None:
    return records[["width", "height"]].to_numpy(dtype=float) if "width" in records else None


def _duplicates(report: Path) -> Duplicates | None:
    return duplicates_of(json.loads(report.read_text())) if report.is_file() else None
