"""Fréchet and kernel distance, precision and recall of two sets of image features. On Inception's features they are FID and KID.

Such a score means nothing without the feature network, the reference set, the image path (size, resize filter, file format) and the
sample count: record them with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

CELLS = 1 << 24
"""Largest matrix of pairs in memory, 128 MiB as float64; larger ones are computed in blocks of rows."""

SAME = 1e-12
"""Squared distances below this fraction of the squared lengths are rounding errors and count as 0."""


def _check(
    features_a: np.ndarray, features_b: np.ndarray, names: tuple[str, str] = ("features_a", "features_b")
) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(features_a, dtype=np.float64), np.asarray(features_b, dtype=np.float64)
    for name, features in zip(names, (a, b), strict=True):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name} must be (n >= 2, d), found shape {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError(f"{name} has values that are not finite")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features have different widths: {a.shape[1]} and {b.shape[1]}")
    return a, b


def _covariance(features: np.ndarray) -> np.ndarray:
    return np.atleast_2d(np.cov(features, rowvar=False))


def _root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semi-definite matrix; negative eigenvalues, which are rounding errors, count as 0."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def gaussian_distance(mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians: ``|ma - mb|^2 + tr(A) + tr(B) - 2 tr((AB)^1/2)``.

    ``tr((AB)^1/2)`` is computed as the sum of the singular values of ``A^1/2 B^1/2``. That is equal, and accurate also for singular
    covariances (fewer samples than dimensions), for which a matrix square root of ``AB`` fails.
    """
    cross = np.linalg.svd(_root(covariance_a) @ _root(covariance_b), compute_uv=False).sum()
    difference = np.asarray(mean_a, dtype=np.float64) - np.asarray(mean_b, dtype=np.float64)
    distance = difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    return float(max(distance, 0.0))


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Squared Fréchet distance of Gaussians fitted to two sets of features, ``(n, d)`` and ``(m, d)``; computed in float64.

    Biased upward if ``n`` or ``m`` is small: compare only values of equal sample counts (Heusel et al. 2017; Chong & Forsyth 2020).

    Raises:
        ValueError: for fewer than two rows, different widths, or values that are not finite.
    """
    a, b = _check(features_a, features_b)
    return gaussian_distance(a.mean(0), _covariance(a), b.mean(0), _covariance(b))


def kernel_distance(features_a: np.ndarray, features_b: np.ndarray, subsets: int, subset_size: int, seed: int) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel ``(x.y / d + 1)^3``; on Inception's features, KID.

    Unlike the Fréchet distance it is not biased by the sample count, and may be slightly negative if the sets agree. Computed in
    float64 as the mean over random subsets (Binkowski et al. 2018, whose code takes 100 of 1,000); papers often quote it times 1,000.

    Args:
        features_a: ``(n, d)``.
        features_b: ``(m, d)``.
        subsets: pairs of subsets to average over.
        subset_size: rows sampled from each set without replacement; a smaller set is used whole. If both are,
            they are compared once.
        seed: of the sampling.

    Raises:
        ValueError: for fewer than two rows, different widths, values that are not finite, no subset, or a subset of fewer than two rows.
    """
    a, b = _check(features_a, features_b)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"subsets must be at least 1 and subset_size at least 2, found {subsets} and {subset_size}")
    if subset_size >= max(len(a), len(b)):
        return _discrepancy(a, b)
    rng = np.random.default_rng(seed)
    chosen = [[rng.choice(len(x), min(subset_size, len(x)), replace=False) for x in (a, b)] for _ in range(subsets)]
    return float(np.mean([_discrepancy(a[rows_a], b[rows_b]) for rows_a, rows_b in chosen]))


def _discrepancy(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased estimate of Gretton et al. 2012, eq. 3: no row is paired with itself."""
    within = [(_kernel_sum(x, x) - _kernel(np.einsum("nd,nd->n", x, x), x.shape[1]).sum()) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(sum(within) - 2 * _kernel_sum(a, b) / (len(a) * len(b)))


def _kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum(_kernel(block @ b.T, a.shape[1]).sum() for block in _row_blocks(a, len(b))))


def _kernel(products: np.ndarray, width: int) -> np.ndarray:
    return (products / width + 1) ** 3


def _row_blocks(rows: np.ndarray, columns: int) -> Iterator[np.ndarray]:
    """``rows`` in order, in blocks whose pairs with ``columns`` others are at most :data:`CELLS`, or single rows."""
    step = max(1, CELLS // columns)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def precision_recall(real: np.ndarray, generated: np.ndarray, neighbors: int = 3) -> tuple[float, float]:
    """Precision, the share of generated features in the manifold of the real ones, and recall, the reverse; 0 to 1.

    A set's manifold is the union of balls around its members with the distance to their ``neighbors``-th nearest other member as radius
    (Kynkäänniemi et al. 2019, who use 3, and sets of equal size). Low precision: images unlike any real one; low recall: kinds of images
    that are never generated. Computed in float64 with bounded memory; time grows with the product of the counts.

    Args:
        real: ``(n, d)``.
        generated: ``(m, d)``.
        neighbors: at least 1, fewer than ``n`` and ``m``.

    Raises:
        ValueError: for too few rows, different widths, or values that are not finite.
    """
    inside, reached = within_manifolds(real, generated, neighbors)
    return float(inside.mean()), float(reached.mean())


def within_manifolds(real: np.ndarray, generated: np.ndarray, neighbors: int) -> tuple[np.ndarray, np.ndarray]:
    """Generated features in the manifold of the real ones, bool ``(m,)``, and real features in that of the generated ones, ``(n,)``.

    Their means are :func:`precision_recall`.
    """
    real, generated = _check(real, generated, ("real", "generated"))
    for name, features in (("real", real), ("generated", generated)):
        if not 1 <= neighbors < len(features):
            raise ValueError(f"neighbors {neighbors} must be at least 1 and less than the {len(features)} rows of {name}")
    center = real.mean(0)  # rounding of distances is smallest near the origin
    real, generated = real - center, generated - center
    return _covered(generated, real, neighbors), _covered(real, generated, neighbors)


def _covered(queries: np.ndarray, members: np.ndarray, neighbors: int) -> np.ndarray:
    """Queries in the manifold of ``members``, bool (queries,)."""
    # At position 0 of the sorted distances is the member itself.
    radii = [np.partition(squared, neighbors, axis=1)[:, neighbors] for squared in _squared_distances(members, members)]
    reach = np.concatenate(radii)
    return np.concatenate([(squared <= reach).any(axis=1) for squared in _squared_distances(queries, members)])


def _squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """Squared Euclidean distances ``(rows, len(b))`` of successive blocks of ``a``; exactly 0 for equal rows."""
    lengths = np.einsum("nd,nd->n", b, b)
    for block in _row_blocks(a, len(b)):
        scale = np.einsum("nd,nd->n", block, block)[:, None] + lengths
        squared = scale - 2 * block @ b.T
        yield np.where(squared > SAME * scale, squared, 0.0)
