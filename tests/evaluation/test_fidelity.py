"""Distances of feature sets, precision and recall against closed forms, SciPy's matrix square root, and loops over pairs."""

import numpy as np
import pytest
from scipy import linalg

from cm3leon.evaluation import fidelity
from cm3leon.evaluation.fidelity import covered, frechet_distance, gaussian_distance, kernel_distance


def features(seed: int, n: int, d: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return shift + scale * rng.normal(size=(n, d)) @ np.diag(np.linspace(0.5, 2, d))


def by_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(cov_a + cov_b - 2 * np.real(linalg.sqrtm(cov_a @ cov_b))))


def test_frechet_distance_agrees_with_scipys_matrix_square_root() -> None:
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


def test_features_of_wrong_shape_or_value_are_an_error() -> None:
    good = features(0, 10, 4)
    with pytest.raises(ValueError, match="n >= 2"):
        frechet_distance(good[:1], good)
    with pytest.raises(ValueError, match="different widths"):
        frechet_distance(good, good[:, :3])
    with pytest.raises(ValueError, match="has NaN or infinite values"):
        frechet_distance(good, np.full((5, 4), np.nan))


def discrepancy_by_loop(a: np.ndarray, b: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(np.dot(x, y)) / len(x) + 1) ** 3

    n, m = len(a), len(b)
    within_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_a + within_b - 2 * sum(kernel(x, y) for x in a for y in b) / (n * m)


def test_kernel_distance_agrees_with_a_loop() -> None:
    a, b = features(0, 31, 5), features(1, 24, 5, shift=0.4)
    expected = discrepancy_by_loop(a, b)
    assert kernel_distance(a, b, 10, 31, 0) == pytest.approx(expected, rel=1e-10)
    assert kernel_distance(a.astype(np.float32), b, 1, 1000, 0) == pytest.approx(expected, rel=1e-4)


def test_kernel_distance_averages_over_subsets() -> None:
    a, b = features(0, 31, 5), features(1, 8, 5, shift=0.4)
    rng = np.random.default_rng(7)
    expected = []
    for _ in range(4):
        rows_a, rows_b = (rng.choice(len(x), size, replace=False) for x, size in ((a, 12), (b, 8)))
        expected.append(discrepancy_by_loop(a[rows_a], b[rows_b]))
    assert kernel_distance(a, b, 4, 12, 7) == pytest.approx(np.mean(expected), rel=1e-10)
    assert kernel_distance(a, b, 4, 12, 8) != kernel_distance(a, b, 4, 12, 7)


def test_kernel_distance_of_point_masses() -> None:
    a, b = np.zeros((6, 4)), np.ones((9, 4))
    assert kernel_distance(a, b, 1, 100, 0) == pytest.approx(1 + 8 - 2, rel=1e-12)


def test_kernel_distance_is_unbiased_and_grows_with_shift() -> None:
    pairs = [(features(2 * i, 20, 6), features(2 * i + 1, 20, 6)) for i in range(300)]
    same = np.array([kernel_distance(a, b, 1, 20, 0) for a, b in pairs])
    assert (same < 0).any() and abs(same.mean()) < 4 * same.std() / np.sqrt(len(same))
    near, far = (kernel_distance(features(0, 400, 6), features(1, 400, 6, shift=shift), 5, 200, 0) for shift in (0.3, 1.0))
    assert 0 < near < far


@pytest.mark.parametrize("neighbors", [1, 3, 5])
def test_coverage_agrees_with_a_loop(neighbors: int) -> None:
    real, generated = features(0, 60, 4), features(1, 45, 4, shift=0.7, scale=0.8)
    radii = [sorted(np.linalg.norm(x - y) for j, y in enumerate(real) if j != i)[neighbors - 1] for i, x in enumerate(real)]
    expected = [min(np.linalg.norm(x - y) for y in generated) <= radius for x, radius in zip(real, radii)]
    assert covered(real, generated, neighbors).tolist() == expected
    assert 0 < np.mean(expected) < 1


def test_coverage_of_equal_and_of_distant_sets() -> None:
    real = features(0, 80, 16) + 1000
    assert covered(real, real[::-1]).all()
    once = features(1, 13, 333)
    assert covered(np.repeat(once, 6, axis=0), once).all()  # balls of radius 0 hold their centers
    assert not covered(real, real + 100).any()


def test_equal_rows_have_exactly_zero_distance() -> None:
    a = features(1, 40, 333)
    (squared,) = fidelity._squared_distances(a, np.concatenate([a, a[::-1] + 0.01]))
    assert (np.diag(squared) == 0).all() and (squared > 0).sum() == squared.size - 40
    np.testing.assert_allclose(np.diag(squared[:, :39:-1]), 333 * 0.01**2, rtol=1e-8)


def test_mode_collapse_lowers_coverage_and_images_unlike_any_do_not_raise_it() -> None:
    def modes(seed: int, *centers: float) -> np.ndarray:
        return np.concatenate([features(seed + int(center), 100, 6, shift=center) for center in centers])

    real = modes(0, 0, 20)
    good = covered(real, modes(50, 0, 20)).mean()
    assert good > 0.9
    assert covered(real, modes(50, 0)).mean() == pytest.approx(good / 2, abs=0.05)
    assert covered(real, modes(50, 0, 20, 40)).mean() == good
    assert covered(real, np.repeat(real[:1], 200, axis=0)).mean() < 0.1  # one image again and again


def test_scores_do_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = features(0, 50, 5), features(1, 40, 5, shift=0.4)
    distance, found = kernel_distance(a, b, 1, 50, 0), covered(a, b)
    for pairs in (1, 7 * 40):  # one row in a block; blocks that do not divide the rows
        monkeypatch.setattr(fidelity, "MAX_PAIRS", pairs)
        assert kernel_distance(a, b, 1, 50, 0) == pytest.approx(distance, rel=1e-10)
        assert np.array_equal(covered(a, b), found)


def test_impossible_subsets_and_neighbors_are_an_error() -> None:
    good = features(0, 10, 4)
    for subsets, size in ((0, 5), (3, 1)):
        with pytest.raises(ValueError, match="subsets must be at least 1 and subset_size at least 2"):
            kernel_distance(good, good, subsets, size, 0)
    with pytest.raises(ValueError, match="different widths"):
        kernel_distance(good, good[:, :3], 1, 10, 0)
    for neighbors in (0, 10):
        with pytest.raises(ValueError, match=f"neighbors {neighbors} must .* the 10 rows of real"):
            covered(good, good[:5], neighbors)
    with pytest.raises(ValueError, match="generated has NaN or infinite values"):
        covered(good, np.full((5, 4), np.nan))
