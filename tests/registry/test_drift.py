"""The drift check fails for data of another kind, and not for another sample of the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from registry_support import released

from cm3leon.config import paths
from cm3leon.config.schema import DriftConfig
from cm3leon.registry import drift
from cm3leon.registry.drift import Data, compare_data, separability

LIMITS = DriftConfig()


def data(seed: int, shift: float = 0.0, **changes: object) -> Data:
    """A thousand documents of one distribution; ``shift`` moves their embeddings, in standard deviations."""
    rng = np.random.default_rng(seed)
    made = Data(
        ids=[f"{seed}-{number}" for number in range(1000)],
        licenses=pd.Series(["CC0-1.0"] * 700 + ["CC-BY-4.0"] * 300),
        lengths=rng.normal(60, 10, 1000),
        sizes=rng.normal(512, 50, 1000),
        embeddings=rng.normal(size=(1000, 32)) + shift / np.sqrt(32),
    )
    return made._replace(**changes)


def failed(found: drift.Drift) -> list[str]:
    return [shift.name for shift in found.shifts if not shift.passed]


def test_another_sample_of_the_same_data_passes() -> None:
    found = compare_data(LIMITS, data(0), data(1), 0)
    assert found.passed and str(found) == "the data is like that of the champion"
    assert [shift.value for shift in found.shifts if shift.name == "lost"] == [1.0]
    assert found.page.count("<img") == 4


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("auc", {"shift": 3.0}),
        ("caption_shift", {"lengths": np.random.default_rng(2).normal(90, 10, 1000)}),
        ("size_shift", {"sizes": np.random.default_rng(2).normal(300, 50, 1000)}),
        ("license_shift", {"licenses": pd.Series(["CC0-1.0"] * 400 + ["CC-BY-SA-4.0"] * 600)}),
    ],
)
def test_each_kind_of_drift_is_found_and_named(name: str, changed: dict[str, object]) -> None:
    found = compare_data(LIMITS, data(0), data(1, **changed), 0)
    assert failed(found) == [name]
    assert f"drift.max_{name} is" in str(found) and "past the limit" in found.page


def test_documents_that_are_gone_are_counted() -> None:
    old = data(0)
    half = data(0, ids=old.ids[:500])
    assert failed(compare_data(LIMITS.model_copy(update={"max_lost": 0.4}), old, half, 0)) == ["lost"]
    assert not failed(compare_data(LIMITS.model_copy(update={"max_lost": 0.5}), old, half, 0))


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


def test_sizes_that_an_earlier_version_did_not_keep_are_not_compared() -> None:
    found = compare_data(LIMITS, data(0, sizes=None), data(1), 0)
    assert found.passed and "not known" in found.page


def test_new_data_of_a_project_is_compared_with_its_champion(stages: Path) -> None:
    assert drift.check_drift(LIMITS, 0, stages / "drift.html") == "there is no champion yet whose data could be compared"
    assert not (stages / "drift.html").exists()
    released(0.5)
    manifest = pd.read_parquet(paths.VALIDATED / "manifest.parquet")
    shard_of(stages)
    manifest["licence"] = "CC-BY-SA-4.0"
    manifest.to_parquet(paths.VALIDATED / "manifest.parquet")
    with pytest.raises(drift.DriftError, match=r"100% of the documents have another license.*new: CC-BY-SA-4.0.*drift.html"):
        drift.check_drift(LIMITS, 0, stages / "drift.html")
    assert "past the limit" in (stages / "drift.html").read_text()


def shard_of(root: Path) -> None:
    """The images to which the manifest refers."""
    import io
    import tarfile

    from PIL import Image

    paths.RAW.mkdir(parents=True, exist_ok=True)
    with tarfile.open(paths.RAW / "images-00000.tar", "w") as archive:
        for number, color in enumerate(("red", "blue", "green", "white")):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), color).save(file, "PNG")
            entry = tarfile.TarInfo(f"{number:06d}.png")
            entry.size = file.tell()
            file.seek(0)
            archive.addfile(entry, file)
