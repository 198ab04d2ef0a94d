"""Distance between two sets of image features: Frechet (FID where the features are Inception's).

The number means nothing without the feature network, the reference set, the image path (size, resize filter, file format) and the
sample count: record them beside it.
"""

from __future__ import annotations

import numpy as np


def _check(features_a: np.ndarray, features_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(features_a, dtype=np.float64), np.asarray(features_b, dtype=np.float64)
    for name, features in (("features_a", a), ("features_b", b)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name} must be (n >= 2, d), found shape {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError(f"{name} holds values that are not finite")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features have different widths: {a.shape[1]} and {b.shape[1]}")
    return a, b


def _covariance(features: np.ndarray) -> np.ndarray:
    return np.atleast_2d(np.cov(features, rowvar=False))


def _root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semi-definite matrix; rounding's negative eigenvalues count as 0."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def gaussian_distance(mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: ``|ma - mb|^2 + tr(A) + tr(B) - 2 tr((AB)^1/2)``.

    ``tr((AB)^1/2)`` is taken as the sum of the singular values of ``A^1/2 B^1/2``, which is the same and stays accurate where the
    covariances are singular (fewer samples than dimensions), where a matrix square root of ``AB`` fails.
    """
    cross = np.linalg.svd(_root(covariance_a) @ _root(covariance_b), compute_uv=False).sum()
    difference = np.asarray(mean_a, dtype=np.float64) - np.asarray(mean_b, dtype=np.float64)
    distance = difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    return float(max(distance, 0.0))


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Squared Frechet distance of Gaussians fitted to two sets of features, ``(n, d)`` and ``(m, d)``; computed in float64.

    Biased upwards when ``n`` or ``m`` is small: compare only values of equal sample counts (Heusel et al. 2017; Chong & Forsyth 2020).

    Raises:
        ValueError: for fewer than two rows, different widths, or values that are not finite.
    """
    a, b = _check(features_a, features_b)
    return gaussian_distance(a.mean(0), _covariance(a), b.mean(0), _covariance(b))
