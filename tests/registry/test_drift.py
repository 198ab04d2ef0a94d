"""The drift check fails for data of another kind, and not for another sample of the same; a run past a limit is stopped until accepted."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from registry_support import CONFIG, evaluated, released, write_shard

from cm3leon.config import paths
from cm3leon.config.schema import DriftConfig
from cm3leon.registry import drift, registry
from cm3leon.registry.bundle import BundleError
from cm3leon.registry.drift import Drift, check_run
from cm3leon.registry.drift_page import drift_page
from cm3leon.registry.shifts import Data, Duplicates, features, off_range, separability, shifts_between
from cm3leon.tracking import runs

LIMITS = DriftConfig()


def data(seed: int, shift: float = 0.0, count: int = 1000, **changes: object) -> Data:
    """Documents of one distribution; ``shift`` moves their embeddings, in standard deviations."""
    rng = np.random.default_rng(seed)
    made = Data(
        ids=[f"{seed}-{number}" for number in range(count)],
        licenses=pd.Series(["CC0-1.0"] * round(0.7 * count) + ["CC-BY-4.0"] * round(0.3 * count)),
        lengths=rng.normal(60, 10, count),
        sides=rng.normal(512, 50, (count, 2)),
        duplicates=Duplicates(count, 0.0, 0.03),
        embeddings=rng.normal(size=(count, 32)) + shift / np.sqrt(32),
    )
    return made._replace(**changes)


def compared(old: Data, new: Data) -> Drift:
    """What is found, and its page."""
    shifts = shifts_between(LIMITS, old, new, 0)
    return Drift(shifts, drift_page(shifts, old, new))


def failed(old: Data, new: Data, limits: DriftConfig = LIMITS) -> list[str]:
    """Names of the comparisons that are past their limits."""
    return [shift.name for shift in shifts_between(limits, old, new, 0) if not shift.passed]


def test_another_sample_of_the_same_data_passes() -> None:
    found = compared(data(0), data(1))
    assert found.passed and str(found) == "the data is like that of the champion"
    assert found.values["lost"] == 1.0 and found.page.count("<img") == 5


@pytest.mark.parametrize("count", [10, 20, 50])
def test_a_small_sample_of_the_same_data_passes(count: int) -> None:
    found = [shift for seed in range(1, 11) for shift in shifts_between(LIMITS, data(0), data(seed, count=count), 0)]
    assert [str(shift) for shift in found if not shift.passed] == []


WIDE = np.random.default_rng(2).normal((700, 512), 50, (1000, 2))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("auc", {"shift": 3.0}),
        ("caption_shift", {"lengths": np.random.default_rng(2).normal(90, 10, 1000)}),
        ("size_shift", {"sides": WIDE}),
        ("size_shift", {"sides": WIDE[:, ::-1]}),
        ("license_shift", {"licenses": pd.Series(["CC0-1.0"] * 400 + ["CC-BY-SA-4.0"] * 600)}),
        ("duplicate_shift", {"duplicates": Duplicates(1000, 0.15, 0.03)}),
        ("duplicate_shift", {"duplicates": Duplicates(1000, 0.0, 0.2)}),
    ],
)
def test_each_kind_of_drift_is_found_and_named(name: str, changed: dict[str, object]) -> None:
    assert failed(data(0), data(1, **changed)) == [name]


def test_what_is_past_its_limit_is_said_in_words_and_on_the_page() -> None:
    found = compared(data(0), data(1, lengths=WIDE[:, 0]))
    assert str(found) == "lengths of captions differ by 1.00, drift.max_caption_shift is 0.2 + 0.087 for chance"
    assert found.page.count("past the limit") == found.to_markdown().count("past the limit") == 1
    assert str(found) in found.to_markdown() and f"<b>{found}</b>" in found.page


def test_captions_that_do_not_fit_their_images_are_found() -> None:
    """Each side by itself is as before."""
    rng = np.random.default_rng(0)

    def embedded(fit: float) -> np.ndarray:
        image = rng.normal(size=(1000, 16))
        return features(fit * image + rng.normal(size=image.shape), image)

    fitting = data(0, embeddings=embedded(1.0))
    assert not failed(fitting, data(1, embeddings=embedded(1.0)))
    assert failed(fitting, data(1, embeddings=embedded(0.0))) == ["auc"]


def test_documents_that_are_gone_are_counted() -> None:
    old = data(0)
    half = data(0, ids=old.ids[:500])
    assert failed(old, half, LIMITS.model_copy(update={"max_lost": 0.4})) == ["lost"]
    assert not failed(old, half, LIMITS.model_copy(update={"max_lost": 0.5}))


def test_near_duplicates_are_compared_by_what_collections_of_both_sizes_should_have() -> None:
    before = Duplicates(1000, 0.0, 0.1)
    for share in (0.1, 0.15, 1 - 0.9**2):  # as many copies as before; some of them by chance; all by chance, with twice as many records
        assert off_range(before, Duplicates(2000, 0.0, share)) == 0
    assert off_range(before, Duplicates(2000, 0.0, 0.3)) == pytest.approx(0.3 - 0.19)
    assert off_range(before, Duplicates(500, 0.0, 0.01)) == pytest.approx(1 - 0.9**0.5 - 0.01)


def test_separability_is_the_area_that_theory_expects() -> None:
    """Two normal distributions a distance d apart: AUC = Phi(d / sqrt(2)) for the best discriminant (Bayes)."""
    from scipy.stats import norm

    rng = np.random.default_rng(0)
    for distance in (0.0, 1.0, 2.0):
        direction = rng.normal(size=16)
        direction *= distance / np.linalg.norm(direction)
        old, new = rng.normal(size=(4000, 16)), rng.normal(size=(4000, 16)) + direction
        assert separability(old, new, 0) == pytest.approx(norm.cdf(distance / np.sqrt(2)), abs=0.02)
    assert separability(old[:2], new[:2], 0) == 0.5  # nothing can be said of two documents


def test_what_an_earlier_version_did_not_keep_is_not_compared() -> None:
    found = compared(data(0, sides=None, duplicates=None), data(1))
    assert found.passed and found.page.count("not known") == 2


def change_licenses() -> None:
    """Make the training data in the working directory another one."""
    manifest = pd.read_parquet(paths.VALIDATED / "manifest.parquet")
    manifest["licence"] = "CC-BY-SA-4.0"
    manifest.to_parquet(paths.VALIDATED / "manifest.parquet")


def test_a_run_is_stopped_until_a_person_accepts_this_data(stages: Path) -> None:
    def checked(accept: bool = False) -> drift.Checked:
        with runs.pipeline_run(CONFIG) as run:
            return check_run(CONFIG, run, accept)

    page = Path("drift.html")
    assert checked().message == drift.check_drift(CONFIG, page) == "there is no champion yet whose data could be compared"
    md5 = hashlib.md5((paths.VALIDATED / "manifest.parquet").read_bytes(), usedforsecurity=False).hexdigest()
    used = {"deps": [{"path": "data/validated/manifest.parquet", "md5": md5}]}
    Path("dvc.lock").write_text(yaml.safe_dump({"stages": {"encoder": used}}))
    released(0.5)
    shutil.rmtree(paths.RAW, ignore_errors=True)  # nothing is read of the same data
    assert checked() == drift.Checked("the data is that of the champion, version 1")

    change_licenses()
    assert checked().stopped and "cannot be compared" in checked().message  # its images are not there
    write_shard()
    found = checked()
    assert found.stopped and found.drift is not None and not found.drift.passed
    with pytest.raises(drift.DriftError, match=r"100% of the documents have another license.*new: CC-BY-SA-4.0.*drift.html"):
        drift.check_drift(CONFIG, page)
    assert "past the limit" in page.read_text()
    assert "100% of the documents have another license" in found.message and ".cache/drift.html" in found.message
    accepted = checked(accept=True)
    assert not accepted.stopped and accepted.message.startswith("accepted: ")
    again = checked()
    assert not again.stopped and again.drift is None and again.message.startswith("this data was accepted in the run pipeline")

    manifest = pd.read_parquet(paths.VALIDATED / "manifest.parquet").assign(licence="CC-BY-4.0")
    manifest.to_parquet(paths.VALIDATED / "manifest.parquet")
    assert checked().stopped  # other data than what was accepted


def test_models_are_not_registered_with_data_that_came_after_them(stages: Path) -> None:
    change_licenses()
    with pytest.raises(BundleError, match="the data in data/validated changed since the models were trained"):
        registry.register_outputs(CONFIG)
    assert registry.status() == []


def test_a_version_keeps_the_report_of_validation_for_later_comparisons(stages: Path) -> None:
    report = {"read": 200, "accepted": 100, "reasons": {"duplicate": 20}, "parts": {"rows_with_near_duplicates": 10}}
    (paths.VALIDATED / "report.json").write_text(json.dumps(report))
    assert drift.champion_data(evaluated(0.5).path, 10, 0).duplicates == Duplicates(100, 0.1, 0.1)
