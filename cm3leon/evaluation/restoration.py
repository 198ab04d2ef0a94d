"""PSNR and SSIM of restored images on luma (Y), by the conventions of super-resolution papers; higher is better.

Each of these conventions changes the scores:

- RGB is converted to the Y channel of ITU-R BT.601 in studio range like in MATLAB's ``rgb2ycbcr``: black is 16, white 235. The peak is
  255 nevertheless.
- Y is *not* rounded. RCAN's MATLAB script and BasicSR (and SwinIR and others that use it) convert floating-point images; older papers
  whose networks work on Y alone (SRCNN) compare Y rounded to 8 bits. Rounding lowers PSNR by 0.02 dB at 33 dB and by 0.1 dB at 41 dB.
- ``crop`` pixels at every border are left out, usually as many as the scale.
- A gray image is its own Y, 0 to 255. Stored as RGB, the same image is compressed to studio range and has 1.32 dB more. RCAN reads the
  gray images of test sets as gray, BasicSR as RGB.
- The score of a set is the mean over its images.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.ndimage import correlate1d

PEAK = 255.0
LUMA = np.array([65.481, 128.553, 24.966]) / 255
"""Weights of R, G and B (0 to 255) in Y, to which 16 is added: BT.601 with the digits of MATLAB's ``rgb2ycbcr``."""

RADIUS, SIGMA = 5, 1.5
WINDOW = 2 * RADIUS + 1
"""SSIM's Gaussian window: 11 x 11 pixels of standard deviation 1.5."""
K1, K2 = 0.01, 0.03
"""SSIM's constants, fractions of the peak."""


def _pixels(name: str, image: Image.Image | np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) or (h, w) of an image that is called ``name`` in errors."""
    if isinstance(image, Image.Image) and image.mode not in ("RGB", "L"):
        raise ValueError(f"{name} is an image of mode {image.mode}; convert it to RGB or L")
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise ValueError(f"{name} must be uint8, found {pixels.dtype}")
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] != 3):
        raise ValueError(f"{name} must be (h, w, 3) RGB or (h, w) gray, found shape {pixels.shape}")
    return pixels


def to_luma(pixels: np.ndarray) -> np.ndarray:
    """Y of an image, float64 ``(h, w)``, not rounded: 16 to 235 for RGB ``(h, w, 3)``; a gray image ``(h, w)`` is its own Y. uint8."""
    return pixels @ LUMA + 16 if pixels.ndim == 3 else pixels.astype(np.float64)


def _cropped_luma(hr: Image.Image | np.ndarray, sr: Image.Image | np.ndarray, crop: int, smallest: int) -> tuple[np.ndarray, np.ndarray]:
    """Y of both images without ``crop`` pixels at each border, of which ``smallest`` pixels a side must be left."""
    original, restored = _pixels("hr", hr), _pixels("sr", sr)
    if original.shape != restored.shape:
        raise ValueError(f"images differ in size or channels: hr {original.shape}, sr {restored.shape}")
    height, width = original.shape[:2]
    if crop < 0 or min(height, width) - 2 * crop < smallest:
        raise ValueError(f"crop {crop} of {height}x{width} pixels: it must not be negative, and leave {smallest}x{smallest} or more")
    inside = np.s_[crop : height - crop, crop : width - crop]
    return to_luma(original[inside]), to_luma(restored[inside])


def psnr_y(hr: Image.Image | np.ndarray, sr: Image.Image | np.ndarray, crop: int) -> float:
    """Peak signal-to-noise ratio of a restored image on Y, dB: ``10 log10(255^2 / MSE)``; ``inf`` for equal images.

    Args:
        hr: the original, uint8 RGB ``(h, w, 3)`` or gray ``(h, w)``, or such a PIL image.
        sr: the restored image, of the same shape.
        crop: pixels left out at each border.

    Raises:
        ValueError: for images of different shapes or of another type or mode, or a crop that is negative or leaves no pixel.
    """
    original, restored = _cropped_luma(hr, sr, crop, smallest=1)
    error = float(np.square(original - restored).mean())
    return float(10 * np.log10(PEAK**2 / error)) if error else float("inf")


def ssim_y(hr: Image.Image | np.ndarray, sr: Image.Image | np.ndarray, crop: int) -> float:
    """Structural similarity of a restored image on Y, at most 1 (Wang et al. 2004, as in their ``ssim_index.m``).

    Means, variances and covariance are weighted by an 11 x 11 Gaussian of standard deviation 1.5, without Bessel's correction, over all
    windows inside the cropped image. MATLAB's own ``ssim`` pads the image instead.

    Args:
        hr: the original, uint8 RGB ``(h, w, 3)`` or gray ``(h, w)``, or such a PIL image.
        sr: the restored image, of the same shape.
        crop: pixels left out at each border.

    Raises:
        ValueError: for images of different shapes or of another type or mode, or a crop that is negative or leaves less than 11 x 11.
    """
    x, y = _cropped_luma(hr, sr, crop, smallest=WINDOW)
    mean_x, mean_y = _local_mean(x), _local_mean(y)
    variance_x = _local_mean(x * x) - mean_x**2
    variance_y = _local_mean(y * y) - mean_y**2
    covariance = _local_mean(x * y) - mean_x * mean_y
    # SSIM = (2 mx my + c1)(2 cov + c2) / ((mx^2 + my^2 + c1)(vx + vy + c2)), Wang et al. 2004, eq. 13.
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float((luminance * structure).mean())


def _local_mean(values: np.ndarray) -> np.ndarray:
    """Gaussian-weighted means of all 11 x 11 windows: (h, w) -> (h - 10, w - 10)."""
    weights = np.exp(-np.square(np.arange(-RADIUS, RADIUS + 1) / SIGMA) / 2)
    weights /= weights.sum()
    # The Gaussian is separable: one pass along each axis. Windows that reach beyond the image are cut off.
    return correlate1d(correlate1d(values, weights, axis=0), weights, axis=1)[RADIUS:-RADIUS, RADIUS:-RADIUS]
