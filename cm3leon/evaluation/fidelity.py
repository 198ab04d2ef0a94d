"""Fidelity of generated images: Fréchet and kernel distance (FID and KID if the features are Inception's), coverage.

All compare two sets of image features. Scores are comparable only if the feature network, the reference images, the preprocessing (size,
resize filter, file format) and the numbers of images are the same, so the evaluation record states them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

MAX_PAIRS = 1 << 24
"""Pairs of rows in memory at once, 128 MiB as float64; more are computed in blocks of rows."""

ROUNDING = 1e-12
"""Squared distances below this fraction of the squared lengths are rounding errors, and taken as 0."""


def _check(
    features_a: np.ndarray, features_b: np.ndarray, names: tuple[str, str] = ("features_a", "features_b")
) -> tuple[np.ndarray, np.ndarray]:
    """The two sets as float64; raises what the public functions document."""
    a, b = np.asarray(features_a, dtype=np.float64), np.asarray(features_b, dtype=np.float64)
    for name, features in zip(names, (a, b), strict=True):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name} must be (n >= 2, d), found shape {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError(f"{name} has NaN or infinite values")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features have different widths: {a.shape[1]} and {b.shape[1]}")
    return a, b


def _covariance(features: np.ndarray) -> np.ndarray:
    return np.atleast_2d(np.cov(features, rowvar=False))


def _root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semidefinite matrix; eigenvalues that rounding made negative are taken as 0."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def gaussian_distance(mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians: ``|ma - mb|^2 + tr(A) + tr(B) - 2 tr((AB)^1/2)``.

    Means are ``(d,)``, covariances A and B ``(d, d)``.
    """
    # tr((AB)^1/2) is the sum of the singular values of A^1/2 B^1/2. Unlike a matrix square root of AB this is accurate for singular
    # covariances too, that is, for fewer samples than dimensions.
    cross = np.linalg.svd(_root(covariance_a) @ _root(covariance_b), compute_uv=False).sum()
    difference = np.asarray(mean_a, dtype=np.float64) - np.asarray(mean_b, dtype=np.float64)
    distance = difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    return float(max(distance, 0.0))


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Squared Fréchet distance of Gaussians fitted to two sets of features, ``(n, d)`` and ``(m, d)`` (Heusel et al. 2017).

    It is 0 or more, lower is better. It is biased upwards for small ``n`` or ``m``, so compare only distances of equal numbers of images
    (Chong & Forsyth 2020). Computed in float64.

    Raises:
        ValueError: for fewer than two rows, different widths, or NaN or infinite values.
    """
    a, b = _check(features_a, features_b)
    return gaussian_distance(a.mean(0), _covariance(a), b.mean(0), _covariance(b))


def kernel_distance(features_a: np.ndarray, features_b: np.ndarray, subsets: int, subset_size: int, seed: int) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel ``(x.y / d + 1)^3``; KID if the features are Inception's; lower is better.

    Unlike the Fréchet distance it does not depend on the number of images in expectation, and it can be slightly negative for sets of the
    same distribution. It is the mean over random subsets (Binkowski et al. 2018, whose code takes 100 subsets of 1,000), computed in
    float64. Papers often print it times 1,000.

    Args:
        features_a: ``(n, d)``.
        features_b: ``(m, d)``.
        subsets: pairs of subsets to average over.
        subset_size: rows sampled from each set, without replacement; a smaller set is used whole. If both are, they are compared once.
        seed: of the sampled rows.

    Raises:
        ValueError: for fewer than two rows, different widths, NaN or infinite values, no subset, or a subset of fewer than two rows.
    """
    a, b = _check(features_a, features_b)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"subsets must be at least 1 and subset_size at least 2, found {subsets} and {subset_size}")
    if subset_size >= max(len(a), len(b)):
        return _discrepancy(a, b)
    rng = np.random.default_rng(seed)
    sampled = [[rng.choice(len(x), min(subset_size, len(x)), replace=False) for x in (a, b)] for _ in range(subsets)]
    return float(np.mean([_discrepancy(a[rows_a], b[rows_b]) for rows_a, rows_b in sampled]))


def _discrepancy(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3)."""
    # E k(a, a') + E k(b, b') - 2 E k(a, b), where the first two leave out the pairs of a row with itself.
    within = []
    for x in (a, b):
        with_itself = _kernel(np.einsum("nd,nd->n", x, x), x.shape[1]).sum()
        within.append((_kernel_sum(x, x) - with_itself) / (len(x) * (len(x) - 1)))
    return float(sum(within) - 2 * _kernel_sum(a, b) / (len(a) * len(b)))


def _kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
    """The kernel summed over all pairs of rows."""
    return float(sum(_kernel(block @ b.T, a.shape[1]).sum() for block in _row_blocks(a, len(b))))


def _kernel(products: np.ndarray, width: int) -> np.ndarray:
    """``(x.y / d + 1)^3`` from the inner products x.y of rows of width d."""
    return (products / width + 1) ** 3


def _row_blocks(rows: np.ndarray, columns: int) -> Iterator[np.ndarray]:
    """``rows`` in order, in blocks that have at most :data:`MAX_PAIRS` pairs with ``columns`` others, or one row."""
    step = max(1, MAX_PAIRS // columns)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def covered(real: np.ndarray, generated: np.ndarray, neighbors: int = 5) -> np.ndarray:
    """Which real features have a generated one within the distance of their ``neighbors``-th nearest other real one, boolean ``(n,)``.

    The mean is the coverage of Naeem et al. (2020, arXiv 2002.09797): 1 if there are generated images like every real one, 0 for images
    unlike any. The precision of Kynkäänniemi et al. (2019) is not computed: the balls around the outermost of a few hundred real images
    hold noise and black pictures too. Computed in float64 in bounded memory; the time grows with the product of the counts.

    Args:
        real: ``(n, d)``.
        generated: ``(m, d)``.
        neighbors: at least 1, fewer than ``n``.

    Raises:
        ValueError: for too few rows, different widths, or NaN or infinite values.
    """
    real, generated = _check(real, generated, ("real", "generated"))
    if not 1 <= neighbors < len(real):
        raise ValueError(f"neighbors {neighbors} must be at least 1 and less than the {len(real)} rows of real")
    center = real.mean(0)  # squared distances by |a|^2 - 2 a.b + |b|^2 lose fewer digits near the origin
    real, generated = real - center, generated - center
    # The nearest member, position 0, is the member itself, so position k is its k-th nearest neighbor.
    radii = [np.partition(squared, neighbors, axis=1)[:, neighbors] for squared in _squared_distances(real, real)]
    nearest = [squared.min(axis=1) for squared in _squared_distances(real, generated)]
    found: np.ndarray = np.concatenate(nearest) <= np.concatenate(radii)
    return found


def _squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """Squared Euclidean distances, ``(rows, len(b))`` for each block of rows of ``a``; exactly 0 for equal rows."""
    lengths = np.einsum("nd,nd->n", b, b)
    for block in _row_blocks(a, len(b)):
        scale = np.einsum("nd,nd->n", block, block)[:, None] + lengths
        squared = scale - 2 * block @ b.T
        yield np.where(squared > ROUNDING * scale, squared, 0.0)
