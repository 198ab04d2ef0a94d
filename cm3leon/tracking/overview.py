"""What the run of a pipeline shows in MLflow, so that two runs can be compared at a glance.

Its name says what changed against the run before. Its metrics are the headline scores of the evaluation that it used, whether that ran now
or was up to date. Its description repeats both, with the samples. Its datasets, ``dvc.lock`` and the uncommitted changes of the working
tree say what exactly ran.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.sequence.tasks import TASKS
from cm3leon.tracking import lineage
from cm3leon.tracking.runs import MAX_PARAM_CHARACTERS, VERSION_TAG, Run, flatten
from cm3leon.tracking.view import NOTE_TAG, run_page, spaced, write_view
from cm3leon.utils.errors import ConfigError

HEADLINE = tuple(dict.fromkeys([*(task.score for task in TASKS.values()), "clip_score", "fd_encoder"]))
"""Scores of the evaluation record that are metrics of the pipeline's run: the main one of each task, and two of images alone."""
DATASETS = {"raw": paths.RAW, "validated": paths.VALIDATED, "tokens": paths.TOKENS}
SAMPLES = "samples"
"""Key of the sheet of the description."""
COMPARED_TAG, DIRTY_TAG, LOCK_TAG = "compared_with", "git_dirty", "dvc_lock_md5"
COLOR_TAG = "mlflow.runColor"
COLORS = ("#3b6fd4", "#e07b39", "#2a9d60", "#b0449e", "#c9a227", "#4fa3b8")
"""Of runs in MLflow's charts, which by itself gives some the same color."""
MAX_ROWS, MAX_VALUE = 20, 40
"""Most rows of a table in the description, which MLflow limits to 8,000 characters, and most characters of a value."""
NAMED_CHANGES = 2
"""Changed parameters that a run's name tells."""

Changes = dict[str, tuple[str, str]]
"""Parameter -> its value before and now."""


def begin(run: Run, config: Config) -> None:
    """Name the run after what changed against the last finished run of the same profile, and record uncommitted changes."""
    if run.client is None:
        return
    before = run.attempt("search for the run before", lambda client: _last_run(client, run, config.profile))
    params = {name: value[:MAX_PARAM_CHARACTERS] for name, value in flatten(config.model_dump(by_alias=True)).items()}
    changes = {} if before is None else _changes(before.data.params, params)
    run.rename(f"{config.profile} · {_what_changed(before, changes)} · {datetime.now().astimezone():%Y-%m-%d %H:%M}")
    if before is not None:
        run.set_tags({COMPARED_TAG: before.info.run_id})
    run.set_tags({COLOR_TAG: _color(before)})
    if diff := lineage.git_diff():
        run.set_tags({DIRTY_TAG: _uncommitted(config)})
        run.log_text(diff, "git.diff")


def finish(run: Run, verdict: str, evaluated: bool) -> None:
    """Record scores, samples, datasets and ``dvc.lock``, and describe the run.

    Args:
        verdict: how the pipeline ended, in a sentence.
        evaluated: all stages are up to date, so that the evaluation in ``models/`` is that of this run.
    """
    if run.client is None:
        return
    if evaluated:
        run.log_metrics({f"eval/{name}": score for name, score in _scores().items()})
        sheets = ordered_sheets(paths.EVALUATION)
        for sheet in sheets:
            run.log_image(sheet, sheet.stem)
        images = [sheet.stem for sheet in sheets]
        run.attempt("list of runs", lambda client: _save_view(client, run, images))
    if md5 := lineage.dvc_lock_md5():
        run.set_tags({LOCK_TAG: md5})
        run.log_artifact(lineage.DVC_LOCK)
    for name, path in DATASETS.items():
        if path.exists():
            run.log_dataset(path, name)
    run.flush()
    run.attempt("description", lambda client: run.set_tags({NOTE_TAG: _description(client, run, verdict)}))


def ordered_sheets(evaluation: Path) -> list[Path]:
    """The sheets of images of an evaluation, samples of text-to-image first."""
    return sorted(evaluation.glob("*.png"), key=lambda sheet: (sheet.stem != SAMPLES, sheet.stem))


def _save_view(client: Any, run: Run, images: Sequence[str]) -> None:
    before = client.get_run(run.run_id).data.tags.get(COMPARED_TAG, "")
    write_view(client, str(run.experiment_id), [f"eval/{name}" for name in HEADLINE], images, VERSION_TAG, before)


# --- what changed ----------------------------------------------------------------------------------------------------


def _last_run(client: Any, run: Run, profile: str) -> Any | None:
    wanted = f"tags.stage = 'pipeline' AND tags.profile = '{profile}' AND attributes.status = 'FINISHED'"
    found = client.search_runs([run.experiment_id], wanted, order_by=["attributes.start_time DESC"], max_results=1)
    return found[0] if found else None


def _color(before: Any | None) -> str:
    """Another color than that of the run before."""
    used = None if before is None else before.data.tags.get(COLOR_TAG)
    return COLORS[(COLORS.index(used) + 1) % len(COLORS) if used in COLORS else 0]


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> Changes:
    return {name: (before.get(name, "-"), now.get(name, "-")) for name in sorted({*before, *now}) if before.get(name) != now.get(name)}


def _what_changed(before: Any | None, changes: Changes) -> str:
    if before is None:
        return "first run"
    if changes:
        named = [f"{name} {_short(old)} → {_short(new)}" for name, (old, new) in list(changes.items())[:NAMED_CHANGES]]
        more = len(changes) - len(named)
        return ", ".join(named) + (f" and {more} more" if more else "")
    commit = lineage.git_commit()
    return f"code {commit[:7]}" if commit and commit != before.data.tags.get("git_commit") else "same parameters"


def _short(value: str) -> str:
    return value if len(value) <= MAX_VALUE else f"{value[: MAX_VALUE - 1]}…"


def _uncommitted(config: Config) -> str:
    """The files that differ from the commit; of ``params.yaml``, which ``configure`` writes, how it differs from its profile."""
    from cm3leon.config.profiles import load_profile

    files = lineage.changed_files()
    if str(paths.PARAMS) in files:
        try:
            changes = _changes(*(flatten(c.model_dump(by_alias=True)) for c in (load_profile(config.profile), config)))
        except ConfigError:  # the profile is no longer there
            changes = {}
        settings = ", ".join(f"{name}={_short(new)}" for name, (_, new) in changes.items())
        files[files.index(str(paths.PARAMS))] = f"{paths.PARAMS} (profile {config.profile}{' with ' if settings else ''}{settings})"
    return "; ".join(files)


# --- scores and the description --------------------------------------------------------------------------------------


def _scores() -> dict[str, float]:
    """The headline scores of the evaluation record."""
    try:
        scores = json.loads((paths.EVALUATION / "record.json").read_text())["scores"]
    except (OSError, ValueError, KeyError):
        return {}
    return {name: float(scores[name]) for name in HEADLINE if name in scores}


def _description(client: Any, run: Run, verdict: str) -> str:
    """Markdown for MLflow's page of the run: the verdict, the registered version, scores and parameters beside those before, samples."""
    now = client.get_run(run.run_id)
    before = client.get_run(now.data.tags[COMPARED_TAG]) if COMPARED_TAG in now.data.tags else None
    parts = [f"**{verdict}**"]
    if version := now.data.tags.get(VERSION_TAG):
        name, _, number = version.partition("/")
        parts[0] += f" · [{name} version {number}](#/models/{name}/versions/{number})"
    if before is not None:
        changes = _changes(before.data.params, now.data.params)
        link = run_page(before.info.experiment_id, before.info.run_id)
        parts.append(f"{_what_changed(before, changes)}, against [{before.info.run_name}]({link})")
        parts.append(_table("parameter", [(f"`{name}`", _short(old), _short(new)) for name, (old, new) in changes.items()]))
    parts.append(_table("score", _score_rows(before.data.metrics if before else {}, now.data.metrics)))
    images = [file.path for file in client.list_artifacts(run.run_id, "images")]
    if sheet := next((path for path in images if path.startswith(f"images/{SAMPLES}+") and path.endswith(".png")), None):
        parts.append(f"![samples](get-artifact?path={quote(sheet, safe='')}&run_uuid={run.run_id})")
    return "\n\n".join(part for part in parts if part)


def _score_rows(before: Mapping[str, float], now: Mapping[str, float]) -> list[tuple[str, str, str]]:
    names = [name for name in HEADLINE if f"eval/{name}" in now]
    return [(name, f"{before[f'eval/{name}']:.4g}" if f"eval/{name}" in before else "", f"{now[f'eval/{name}']:.4g}") for name in names]


def _table(subject: str, rows: list[tuple[str, str, str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {subject} | before | now |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows[:MAX_ROWS])]
    return spaced("\n".join(lines)) + (f"\n\n{len(rows) - MAX_ROWS} more" if len(rows) > MAX_ROWS else "")
