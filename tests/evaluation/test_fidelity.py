"""Distances of feature sets against closed forms and SciPy's matrix square root."""

import numpy as np
import pytest
from scipy import linalg

from cm3leon.evaluation.fidelity import frechet_distance, gaussian_distance


def features(seed: int, n: int, d: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return shift + scale * rng.normal(size=(n, d)) @ np.diag(np.linspace(0.5, 2, d))


def by_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(cov_a + cov_b - 2 * np.real(linalg.sqrtm(cov_a @ cov_b))))


def test_agrees_with_sqrtm() -> None:
    a, b = features(0, 400, 12), features(1, 300, 12, shift=0.3, scale=1.4)
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-8)


def test_closed_form_for_diagonal_gaussians() -> None:
    mean_a, mean_b = np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 5.0])
    std_a, std_b = np.array([1.0, 2.0, 0.0]), np.array([3.0, 2.0, 0.5])
    expected = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    assert gaussian_distance(mean_a, np.diag(std_a**2), mean_b, np.diag(std_b**2)) == pytest.approx(expected, rel=1e-12)


def test_closed_form_for_large_samples() -> None:
    a, b = features(2, 60_000, 4), features(3, 60_000, 4, shift=1.0, scale=2.0)
    deviations = np.linspace(0.5, 2, 4)
    assert frechet_distance(a, b) == pytest.approx(4 * 1.0 + (deviations**2).sum(), rel=0.02)


def test_fewer_samples_than_dimensions() -> None:
    a = features(4, 20, 64)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + 2.0) == pytest.approx(4 * 64, rel=1e-6)
    b = np.zeros((20, 64))
    assert frechet_distance(a, b) == pytest.approx((a.mean(0) ** 2).sum() + a.var(0, ddof=1).sum(), rel=1e-9)


def test_symmetric_and_invariant_under_rotation() -> None:
    a, b = features(5, 200, 8), features(6, 150, 8, shift=0.2)
    rotation = linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_float32_features_are_computed_in_float64() -> None:
    a = (features(7, 300, 6) + 1000).astype(np.float32)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_refuses_bad_features() -> None:
    good = features(0, 10, 4)
    with pytest.raises(ValueError, match="n >= 2"):
        frechet_distance(good[:1], good)
    with pytest.raises(ValueError, match="different widths"):
        frechet_distance(good, good[:, :3])
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(good, np.full((5, 4), np.nan))
