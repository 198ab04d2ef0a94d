"""A bundle: one directory with everything a finished model needs to generate, caption and answer, its evaluation and its lineage.

    config.json, model.safetensors     the decoder
    training.json                      the tasks it was tuned for, and whether with conditioning dropout, which guidance needs
    image_tokenizer/ text_tokenizer/ encoder/ memory_bank/ super_resolution/
    decoding.json, retrieval.json      decoding defaults; the rules of retrieval
    evaluation/                        record.json, outcomes.parquet and sheets
    training_data.parquet              id, origin, license, attribution, source and size of every training document
    validation.json                    report of the stage validate: counts of records, rejected ones and duplicates, where there is one
    lineage.json                       git commit, md5 of dvc.lock and of the data, MLflow run of each stage, from which other runs'
                                       checkpoints a stage was resumed on request, Prefect flow run
    dvc.lock, params.yaml              as they were, where the project has them: by them DVC finds data and models again

Its identity is :func:`bundle_hash`. Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from cm3leon.config import paths
from cm3leon.config.loading import load_config
from cm3leon.config.schema import Config
from cm3leon.data.manifest import read_manifest
from cm3leon.evaluation.record import FILE as RECORD
from cm3leon.evaluation.record import OUTCOMES, Record
from cm3leon.retrieval.index import DOCUMENTS, multimodal_records
from cm3leon.tracking import lineage
from cm3leon.tracking.lineage import content_hash
from cm3leon.tracking.runs import FLOW_RUN_ENV
from cm3leon.utils.errors import UserError

LINEAGE, TRAINING_DATA, VALIDATION = "lineage.json", "training_data.parquet", "validation.json"
PROJECT_FILES = (lineage.DVC_LOCK, paths.PARAMS)
DATA_COLUMNS = ["id", "origin", "licence", "attribution", "source", "width", "height"]
SHEETS = "*.png"
PICKLED = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib"}


class BundleError(UserError):
    """A bundle cannot be built; the message names the file and the command that writes it."""


class IncompleteRecordError(BundleError):
    """The evaluation record lacks scores, contract or samples, so the model cannot be registered."""


class Bundle(NamedTuple):
    """A bundle and the evaluation record in it, which was found complete and of this model."""

    path: Path
    record: Record


@dataclass(frozen=True)
class Part:
    """Files of a bundle that one stage writes.

    Attributes:
        stage: its name.
        source: its output directory.
        target: where the files go in the bundle.
        required: names of the files without which there is no bundle.
        others: pattern of further files that are taken where they exist.
    """

    stage: str
    source: Path
    target: str
    required: tuple[str, ...] = ("config.json", "model.safetensors")
    others: str | None = None


PARTS = (
    Part("sft", paths.FINETUNED, "", others="training.json"),
    Part("image_tokenizer", paths.IMAGE_TOKENIZER, "image_tokenizer"),
    Part("text_tokenizer", paths.TEXT_TOKENIZER, "text_tokenizer", ("tokenizer.json",)),
    Part("encoder", paths.ENCODER, "encoder", others="tokenizer.json"),
    Part("index", paths.INDEX, "memory_bank", ("index.faiss", "documents.parquet"), others="*"),
    Part("tokenize", paths.TOKENS, "memory_bank/tokens", ("train-00000.arrow",), others="train-*.arrow"),
    Part("super_resolution", paths.SUPER_RESOLUTION, "super_resolution"),
    Part("evaluate", paths.EVALUATION, "evaluation", (RECORD, OUTCOMES), others=SHEETS),
)


def build_bundle(out: Path, config: Config | None = None) -> Bundle:
    """Assemble the bundle from the stages' outputs in ``models/`` and ``data/``, by hard links where the disk allows.

    Args:
        out: directory to write; an existing one is replaced.
        config: for the defaults of decoding and retrieval; None reads ``params.yaml``.

    Raises:
        BundleError: if a stage's output is missing or pickled, the validated data is not what the models were trained on, or another model
            or other decoding defaults were evaluated.
        IncompleteRecordError: as :func:`read_record`.
    """
    config = config or load_config()
    out = Path(out)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)

    # 1. The files of the stages.
    for part in PARTS:
        for file in _files(part):
            target = partial / part.target / file.relative_to(part.source)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(file, target)

    # 2. The evaluation must be of these files and settings, which are part of the model.
    record = read_record(paths.EVALUATION)
    decoding, retrieval = config.decoding.model_dump(mode="json"), config.retrieve.model_dump(mode="json")
    _check_evaluated(record, {"decoding": decoding, "retrieve": retrieval})

    # 3. What the configuration and the lineage add.
    _write(partial / "decoding.json", decoding)
    _write(partial / "retrieval.json", retrieval)
    runs = {file.parent.name: json.loads(file.read_text())["run_id"] for file in sorted(paths.RUNS.glob("*/mlflow_run.json"))}
    origin = {"git_commit": lineage.git_commit(), "dvc_lock_md5": lineage.dvc_lock_md5(), "flow_run": os.environ.get(FLOW_RUN_ENV)}
    data = {str(path): lineage.dvc_md5(path) for path in (paths.RAW, paths.VALIDATED, paths.TOKENS)}
    resumed = {file.parent.name: json.loads(file.read_text()) for file in sorted(paths.RUNS.glob("*/resumed.json"))}
    _write(partial / LINEAGE, {**origin, "data_md5": data, "mlflow_runs": runs} | ({"resumed": resumed} if resumed else {}))
    for file in PROJECT_FILES:  # copies: both are written again in place
        if file.is_file():
            shutil.copyfile(file, partial / file.name)
    if not (paths.VALIDATED / "manifest.parquet").is_file():
        raise BundleError(
            f"{paths.VALIDATED / 'manifest.parquet'} is missing, and the bundle lists its training data; run: cm3leon validate"
        )
    train = read_manifest(paths.VALIDATED, "train")
    _check_documents(train)
    train[DATA_COLUMNS].to_parquet(partial / TRAINING_DATA, index=False)
    if (paths.VALIDATED / "report.json").is_file():
        shutil.copyfile(paths.VALIDATED / "report.json", partial / VALIDATION)

    # 4. The bundle appears whole or not at all.
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return Bundle(out, record)


def _check_evaluated(record: Record, settings: dict[str, dict[str, Any]]) -> None:
    """Raises :class:`BundleError` unless the record is of the models in ``models/`` and of these sections of the parameters."""
    changed = [path for path, known in record.models.items() if content_hash(Path(path)) != known]
    if changed or not record.models:
        which = ", ".join(changed) or "the models"
        raise BundleError(f"{which} changed since the evaluation, so its scores are not those of this model; run: cm3leon evaluate")
    for section, now in settings.items():
        then = record.settings.get(section, {})
        if changed := sorted(f"{section}.{name}" for name in now | then if now.get(name) != then.get(name)):
            raise BundleError(f"parameters changed since the evaluation ({', '.join(changed)}); run: cm3leon evaluate")


def _check_documents(train: pd.DataFrame) -> None:
    """Raises :class:`BundleError` if the memory bank was built of other data, after which ``validate`` has run and the stages have not."""
    known = ["id", "caption", "licence"]
    indexed = pd.read_parquet(paths.INDEX / DOCUMENTS, columns=known)
    if indexed.to_numpy().tolist() != multimodal_records(train)[known].to_numpy().tolist():
        raise BundleError(f"the data in {paths.VALIDATED} changed since the models were trained, and is not theirs; run the pipeline")


def _files(part: Part) -> list[Path]:
    """The files of a part, in a fixed order; raises :class:`BundleError` for one that is missing or pickled."""
    for name in part.required:
        if not (part.source / name).is_file():
            raise BundleError(f"{part.source / name} is missing, and the bundle needs it; run: cm3leon {part.stage}")
    files = {part.source / name for name in part.required}
    files |= {file for file in part.source.glob(part.others) if file.is_file()} if part.others else set()
    for file in files:
        if file.suffix in PICKLED:
            raise BundleError(f"{file} may contain pickled objects, which run code when they are loaded; remove it")
    return sorted(files)


def _link(source: Path, target: Path) -> None:
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def bundle_hash(path: Path) -> str:
    """SHA-256 over names and contents of the bundle's files.

    Lineage, the report of validation, the project's files and sheets of samples do not count: they differ between runs that give the same
    model.
    """
    origin = {LINEAGE, VALIDATION, *(file.name for file in PROJECT_FILES)}
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*"), key=lambda f: f.relative_to(path).as_posix()):
        name = file.relative_to(path).as_posix()
        if not file.is_file() or name in origin or (name.startswith("evaluation/") and file.suffix == ".png"):
            continue
        with file.open("rb") as stream:
            digest.update(f"{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def read_record(directory: Path) -> Record:
    """The evaluation record in ``directory``, complete.

    Raises:
        IncompleteRecordError: if it has no scores, no contract or no sheet of samples, or a score is not a finite number.
    """
    try:
        record = Record.read(directory)
    except FileNotFoundError:
        raise IncompleteRecordError(f"{directory / RECORD} is missing; run: cm3leon evaluate") from None
    except (KeyError, TypeError, ValueError) as error:
        raise IncompleteRecordError(f"{directory / RECORD} is not an evaluation record ({error}); run: cm3leon evaluate") from None
    lacking = [name for name in ("scores", "contract") if not getattr(record, name)]
    lacking += [f"a finite score {name}" for name, score in record.scores.items() if not math.isfinite(score)]
    lacking += [] if any(directory.glob(SHEETS)) else ["sheets of samples"]
    if lacking:
        raise IncompleteRecordError(f"the evaluation record in {directory} lacks {', '.join(lacking)}; run: cm3leon evaluate")
    return record
