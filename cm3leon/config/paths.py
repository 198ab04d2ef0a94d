"""Where the stages read and write, relative to the project's root (the working directory of every stage)."""

from __future__ import annotations

from pathlib import Path

PARAMS = Path("params.yaml")
RAW = Path("data/raw")
WEIGHTS = Path("data/weights")
"""What parameters name of others: a dependency of the stages that read it."""
EXCLUDED = Path("data/excluded")
"""What must not be trained on."""
VALIDATED = Path("data/validated")
TOKENS = Path("data/tokens")
NEIGHBORS = Path("data/neighbours")

IMAGE_TOKENIZER = Path("models/image_tokenizer")
TEXT_TOKENIZER = Path("models/text_tokenizer")
ENCODER = Path("models/encoder")
INDEX = Path("models/index")
PRETRAINED = Path("models/pretrained")
FINETUNED = Path("models/finetuned")
SUPER_RESOLUTION = Path("models/super_resolution")
EVALUATION = Path("models/evaluation")

CHECKPOINTS = Path("models/checkpoints")
"""``CHECKPOINTS / stage / run``: checkpoints from which a run of a stage resumes. Not outputs: DVC deletes those when a stage starts."""

RUNS = Path("models/runs")
"""``RUNS / stage``: what tells of the run that made a stage's outputs, as which MLflow run it was, and when. It is not kept with the
artifacts, so that they depend on data, parameters and code alone, and a stage that gives the same bytes again leaves later stages up to
date."""

OUTPUTS = (RAW, VALIDATED, TOKENS, NEIGHBORS, Path("models"))
"""What stages write, and what holds it."""

DATA_DOCS = RUNS / "validate" / "data_docs"
"""Great Expectations' pages of ``validate``, which bear the time of the run; ``index.html`` is the first."""

DATA_REPORT = DATA_DOCS / "data_report.html"
"""The page that says in words and pictures what ``validate`` has found; with the Data Docs, so that ``cm3leon ui`` serves it too."""

LAST_ACCEPTED = Path(".cache/validate/accepted.parquet")
"""What the last manifest held that ``validate`` has accepted (:mod:`cm3leon.data.last_accepted`). No output, as :data:`CHECKPOINTS`."""


def run_file(stage: str) -> Path:
    """The file that names the MLflow run of ``stage``."""
    return RUNS / stage / "mlflow_run.json"


def resumed_file(stage: str) -> Path:
    """Of a run of ``stage`` that was resumed from checkpoints of other runs: which, at which steps, and how these runs differ."""
    return RUNS / stage / "resumed.json"


def metrics_file(stage: str) -> Path:
    """The headline metrics of the run that made the outputs of ``stage``, as JSON."""
    return RUNS / stage / "metrics.json"
