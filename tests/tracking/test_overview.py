"""Two runs of the pipeline can be compared in MLflow: names, scores, datasets, samples and what was not committed."""

import base64
import hashlib
import json
import subprocess
import zlib
from pathlib import Path

import pytest
from PIL import Image

from cm3leon.config import paths
from cm3leon.config.profiles import configure
from cm3leon.config.schema import Config
from cm3leon.stages.common import STAGES
from cm3leon.stages.evaluate import CALIBRATION
from cm3leon.tracking import overview, runs, store
from cm3leon.tracking.view import KEY, NOTE_TAG, spaced

CONFIGS = Path(__file__).parents[2] / "configs"
SCORES = {"composition": 0.25, "composition/color": 0.9, "edit/done": 0.5, "bleu_1": 0.1}


def client():
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store.tracking_uri())


def pipeline(config: Config, verdict: str = "version 1 is the champion", evaluated: bool = True):
    """A pipeline's run as the flow records it; returns MLflow's entity."""
    with runs.pipeline_run(config) as run:
        overview.begin(run, config)
        run.log_metrics({"pipeline/seconds": 1.0})
        overview.finish(run, verdict, evaluated)
    return client().get_run(run.run_id)


@pytest.fixture
def outputs(project: Path) -> Path:
    """A project with an evaluation and a lock file."""
    paths.EVALUATION.mkdir(parents=True)
    (paths.EVALUATION / "record.json").write_text(json.dumps({"scores": SCORES}))
    for name in ("captions", "samples"):
        Image.new("RGB", (8, 8), "red").save(paths.EVALUATION / f"{name}.png")
    paths.RAW.mkdir(parents=True)
    Path("dvc.lock").write_text(f"stages:\n  ingest:\n    outs:\n    - path: data/raw\n      md5: {'0123456789abcdef' * 2}.dir\n")
    return project


def test_the_name_tells_the_profile_and_what_changed(outputs: Path) -> None:
    names = [
        pipeline(config).info.run_name.split(" · ")[:-1]
        for config in (
            Config(profile="tiny"),
            Config.model_validate({"profile": "tiny", "sft": {"learning_rate": 0.001}}),
            Config(profile="gpu"),
            Config(profile="tiny", seed=1),
            Config(profile="tiny", seed=1),
        )
    ]
    rate = Config().sft.learning_rate
    assert names == [
        ["tiny", "first run"],
        ["tiny", f"sft.learning_rate {rate} → 0.001"],
        ["gpu", "first run"],
        ["tiny", f"seed 0 → 1, sft.learning_rate 0.001 → {rate}"],
        ["tiny", "same parameters"],
    ]


def test_a_failed_run_is_not_what_the_next_is_compared_with(outputs: Path) -> None:
    pipeline(Config(profile="tiny"))
    with pytest.raises(RuntimeError), runs.pipeline_run(Config(profile="tiny", seed=5)):
        raise RuntimeError
    assert "seed 0 → 7" in pipeline(Config(profile="tiny", seed=7)).info.run_name


def test_the_scores_are_those_of_the_evaluation_that_was_used(outputs: Path) -> None:
    found = pipeline(Config(profile="tiny"))
    assert found.data.metrics == {"pipeline/seconds": 1.0, "eval/composition": 0.25, "eval/edit/done": 0.5}
    failed = pipeline(Config(profile="tiny"), "a stage failed", evaluated=False)
    assert failed.data.metrics == {"pipeline/seconds": 1.0}
    assert failed.data.tags[NOTE_TAG].startswith("**a stage failed**")


def test_datasets_samples_and_the_lock_are_the_runs(outputs: Path) -> None:
    found = pipeline(Config(profile="tiny"))
    assert [(i.dataset.name, i.dataset.digest) for i in found.inputs.dataset_inputs] == [("raw", "0123456789abcdef" * 2 + ".dir")]
    files = [file.path for file in client().list_artifacts(found.info.run_id)]
    assert "dvc.lock" in files
    assert [file.path.split("+")[0] for file in client().list_artifacts(found.info.run_id, "images")] == [
        *["images/captions"] * 2,
        *["images/samples"] * 2,
    ]


def test_the_lock_is_that_at_the_end(outputs: Path) -> None:
    Path("dvc.lock").unlink()
    config = Config(profile="tiny")
    with runs.pipeline_run(config) as run:
        overview.begin(run, config)
        Path("dvc.lock").write_text("stages: {}\n")
        overview.finish(run, "", evaluated=False)
    assert client().get_run(run.run_id).data.tags["dvc_lock_md5"] == hashlib.md5(b"stages: {}\n").hexdigest()


def test_the_description_shows_changes_scores_samples_and_the_version(outputs: Path) -> None:
    before = pipeline(Config(profile="tiny"))
    config = Config(profile="tiny", seed=1)
    with runs.pipeline_run(config) as run:
        overview.begin(run, config)
        run.set_tags({runs.VERSION_TAG: "cm3leon/3"})
        overview.finish(run, "version 3 is the champion", evaluated=True)
    note = client().get_run(run.run_id).data.tags[NOTE_TAG]
    assert "**version 3 is the champion**" in note
    assert "(#/models/cm3leon/versions/3)" in note
    assert (
        f"[{before.info.run_name}](#/experiments/{before.info.experiment_id}/runs/{before.info.run_id}?workflowType=machine_learning)"
        in note
    )
    assert "seed 0 → 1, against [" in note
    assert spaced("| `seed` | 0 | 1 |") in note
    assert spaced("| composition | 0.25 | 0.25 |") in note
    [image] = [f.path for f in client().list_artifacts(run.run_id, "images") if f.path.endswith(".png") and "samples" in f.path]
    assert f"path={image.replace('/', '%2F').replace('+', '%2B')}&run_uuid={run.run_id}" in note


def test_what_is_not_committed_is_named_and_kept(outputs: Path) -> None:
    Path("configs").symlink_to(CONFIGS)
    config = configure("tiny")
    Path("code.py").write_text("a = 1\n")
    Path(".gitignore").write_text("/m*\n/data\n/configs\n")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], check=True)
    clean = pipeline(config)
    assert "git_dirty" not in clean.data.tags
    assert not clean.data.tags["git_commit"].endswith("-dirty")
    changed = configure("tiny", ["sft.learning_rate=0.001"])
    Path("code.py").write_text("a = 2\n")
    found = pipeline(changed)
    assert found.data.tags["git_dirty"] == "code.py; params.yaml (profile tiny with sft.learning_rate=0.001)"
    assert found.data.tags["mlflow.source.git.commit"] == clean.data.tags["git_commit"]
    diff = Path(client().download_artifacts(found.info.run_id, "git.diff")).absolute()
    written = Path("params.yaml").read_text()
    subprocess.run(["git", "checkout", "-q", "."], check=True)
    subprocess.run(["git", "apply", diff], check=True)
    assert Path("code.py").read_text() == "a = 2\n"
    assert Path("params.yaml").read_text() == written


def test_the_experiment_has_a_list_of_pipeline_runs_with_their_scores(outputs: Path) -> None:
    found = pipeline(Config(profile="tiny"))
    tags = client().get_experiment(found.info.experiment_id).tags
    saved = tags[f"mlflow.sharedViewState.{KEY}"].removeprefix("deflate;")
    assert len(saved) < 5000  # MLflow's limit
    shown = json.loads(zlib.decompress(base64.b64decode(saved)))
    assert {f"metrics.`{name}`" for name in found.data.metrics if name.startswith("eval/")} <= set(shown["selectedColumns"])
    assert [chart["imageKeys"] for chart in shown["compareRunCharts"] if chart["type"] == "IMAGE"] == [["samples", "captions"]]
    assert shown["compareRunCharts"][0]["baselineColumnUuid"] == ""
    assert f"viewStateShareKey={KEY}" in tags[NOTE_TAG]
    client().set_experiment_tag(found.info.experiment_id, NOTE_TAG, "a person's own words")
    second = pipeline(Config(profile="tiny"))
    tags = client().get_experiment(found.info.experiment_id).tags
    assert tags[NOTE_TAG] == "a person's own words"
    saved = tags[f"mlflow.sharedViewState.{KEY}"].removeprefix("deflate;")
    shown = json.loads(zlib.decompress(base64.b64decode(saved)))
    assert shown["compareRunCharts"][0]["baselineColumnUuid"] == found.info.run_id
    assert second.data.tags[overview.COLOR_TAG] != found.data.tags[overview.COLOR_TAG]


def test_calibrations_are_listed_after_scores_and_stages() -> None:
    assert max([*STAGES, "eval", "pipeline"]) < CALIBRATION


def test_without_a_store_nothing_is_recorded_and_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    with runs.pipeline_run(Config()) as run:
        overview.begin(run, Config())
        overview.finish(run, "done", evaluated=True)
    assert run.run_id is None
