"""PSNR and SSIM of restored images on luma, as the tables of the super-resolution papers give them.

The conventions, each of which moves the figures:

- RGB is converted to the Y channel of ITU-R BT.601 in studio range, as MATLAB's ``rgb2ycbcr`` does, so black is 16 and white 235; the peak
  is 255 nevertheless.
- Y is *not* rounded. RCAN's MATLAB script and BasicSR (with SwinIR and others after it) convert floating-point images; the older tables of
  networks that work on Y alone (SRCNN) compare Y rounded to 8 bits. Rounding takes off 0.02 dB at 33 dB and 0.1 dB at 41 dB.
- ``crop`` pixels of every border are left out: by custom, as many as the scale.
- A gray image is its own Y, 0 to 255. The same image stored as RGB is compressed to studio range and scores 1.32 dB more; RCAN reads the
  gray images of the test sets as gray, BasicSR reads them as RGB.
- A table's figure is the mean over the images of a set.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.ndimage import correlate1d

PEAK = 255.0
LUMA = np.array([65.481, 128.553, 24.966]) / 255
"""Weights of R, G and B, 0 to 255, in Y; 16 is added. BT.601 with the digits of MATLAB's ``rgb2ycbcr``."""

RADIUS, SIGMA = 5, 1.5
WINDOW = 2 * RADIUS + 1
K1, K2 = 0.01, 0.03


def _pixels(name: str, image: Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(image, Image.Image) and image.mode not in ("RGB", "L"):
        raise ValueError(f"{name} is an image of mode {image.mode}; convert it to RGB or L")
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise ValueError(f"{name} must be uint8, found {pixels.dtype}")
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] != 3):
        raise ValueError(f"{name} must be (h, w, 3) RGB or (h, w) gray, found shape {pixels.shape}")
    return pixels


def to_luma(pixels: np.ndarray) -> np.ndarray:
    """float64 ``(h, w)``, not rounded: Y of uint8 RGB ``(h, w, 3)``, from 16 for black to 235 for white; gray ``(h, w)`` as it is."""
    return pixels @ LUMA + 16 if pixels.ndim == 3 else pixels.astype(np.float64)


def _cropped_luma(hr: Image.Image | np.ndarray, sr: Image.Image | np.ndarray, crop: int, smallest: int) -> tuple[np.ndarray, np.ndarray]:
    original, restored = _pixels("hr", hr), _pixels("sr", sr)
    if original.shape != restored.shape:
        raise ValueError(f"images differ in size or channels: hr {original.shape}, sr {restored.shape}")
    height, width = original.shape[:2]
    if crop < 0 or min(height, width) - 2 * crop < smallest:
        raise ValueError(f"crop {crop} of {height}x{width} pixels: it must not be negative, and leave {smallest}x{smallest} or more")
    inside = np.s_[crop : height - crop, crop : width - crop]
    return to_luma(original[inside]), to_luma(restored[inside])


def psnr_y(hr: Image.Image | np.ndarray, sr: Image.Image | np.ndarray, crop: int) -> float:
    """Peak signal-to-noise ratio of a restored image on Y, dB, peak 255; ``inf`` where the two agree.

    Args:
        hr: the original, uint8 RGB ``(h, w, 3)`` or gray ``(h, w)``, or such a PIL image.
        sr: the restored image, of the same shape.
        crop: pixels left out at each border.

    Raises:
        ValueError: for images of different shapes, another type or mode, or a crop that is negative or leaves nothing.
    """
    original, restored = _cropped_luma(hr, sr, crop, smallest=1)
    error = float(np.square(original - restored).mean())
    return float(10 * np.log10(PEAK**2 / error)) if error else float("inf")


def ssim_y(hr: Image.Image | np.ndarray, sr: Image.Image | np.ndarray, crop: int) -> float:
    """Structural similarity of a restored image on Y, at most 1 (Wang et al. 2004, with the constants of their ``ssim_index.m``).

    Means, variances and the covariance are weighted by an 11 x 11 Gaussian of standard deviation 1.5, without Bessel's correction; the
    windows lie wholly inside the cropped image. MATLAB's own ``ssim`` differs: it pads the image.

    Args:
        hr: the original, uint8 RGB ``(h, w, 3)`` or gray ``(h, w)``, or such a PIL image.
        sr: the restored image, of the same shape.
        crop: pixels left out at each border.

    Raises:
        ValueError: for images of different shapes, another type or mode, or a crop that is negative or leaves less than 11 x 11 pixels.
    """
    x, y = _cropped_luma(hr, sr, crop, smallest=WINDOW)
    mean_x, mean_y = _local_mean(x), _local_mean(y)
    variance_x, variance_y = _local_mean(x * x) - mean_x**2, _local_mean(y * y) - mean_y**2
    covariance = _local_mean(x * y) - mean_x * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float((luminance * structure).mean())


def _local_mean(values: np.ndarray) -> np.ndarray:
    """Gaussian-weighted means of all windows inside ``(h, w)``: ``(h - 10, w - 10)``."""
    weights = np.exp(-np.square(np.arange(-RADIUS, RADIUS + 1) / SIGMA) / 2)
    weights /= weights.sum()
    return correlate1d(correlate1d(values, weights, axis=0), weights, axis=1)[RADIUS:-RADIUS, RADIUS:-RADIUS]
