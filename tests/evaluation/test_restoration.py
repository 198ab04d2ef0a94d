"""PSNR and SSIM on luma against scikit-image, a direct double loop, and closed forms."""

import math

import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cm3leon.evaluation.restoration import psnr_y, ssim_y, to_luma


def make_image(height: int = 40, width: int = 53, seed: int = 0) -> np.ndarray:
    """Smooth structure plus noise, uint8 RGB."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 5), np.cos(y / 7), np.sin((x + y) / 9)], axis=-1)
    return np.clip(128 + 90 * waves + rng.normal(scale=12, size=waves.shape), 0, 255).astype(np.uint8)


def worse(image: np.ndarray, scale: float = 10, seed: int = 1) -> np.ndarray:
    return np.clip(image + np.random.default_rng(seed).normal(scale=scale, size=image.shape), 0, 255).astype(np.uint8)


def ssim_by_loop(x: np.ndarray, y: np.ndarray) -> float:
    """One window at a time, with weighted central moments."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            variances = (weights * (a - mean_a) ** 2).sum() + (weights * (b - mean_b) ** 2).sum()
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            values.append(
                (2 * mean_a * mean_b + 2.55**2) * (2 * covariance + 7.65**2) / ((mean_a**2 + mean_b**2 + 2.55**2) * (variances + 7.65**2))
            )
    return float(np.mean(values))


def test_luma_of_known_colors() -> None:
    colors = np.array([[[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=np.uint8)
    np.testing.assert_allclose(to_luma(colors), [[235, 16, 81.481, 144.553, 40.966]], rtol=0, atol=1e-12)


def test_luma_agrees_with_scikit_image_and_is_not_rounded() -> None:
    image = make_image()
    np.testing.assert_allclose(to_luma(image), rgb2ycbcr(image)[..., 0], rtol=0, atol=1e-10)
    assert (to_luma(image) % 1 != 0).mean() > 0.9


def test_psnr_of_known_errors() -> None:
    image = np.full((8, 9, 3), 100, dtype=np.uint8)
    assert psnr_y(image, image + np.uint8(1), 0) == pytest.approx(20 * math.log10(255 / (219 / 255)), abs=1e-9)
    gray = image[..., 0]
    assert psnr_y(gray, gray + np.uint8(1), 0) == pytest.approx(48.1308036, abs=1e-6)  # of one gray level
    assert psnr_y(np.zeros_like(image), np.full_like(image, 255), 0) == pytest.approx(20 * math.log10(255 / 219), abs=1e-9)
    assert psnr_y(image, image, 0) == math.inf


@pytest.mark.parametrize("crop", [0, 2, 4])
def test_agrees_with_scikit_image(crop: int) -> None:
    hr = make_image()
    sr = worse(hr)
    x, y = (rgb2ycbcr(image)[crop : 40 - crop, crop : 53 - crop, 0] for image in (hr, sr))
    assert psnr_y(hr, sr, crop) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=255), abs=1e-9)
    settings = {"win_size": 11, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    _, full = structural_similarity(x, y, full=True, **settings)
    assert ssim_y(hr, sr, crop) == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-12)


def test_ssim_agrees_with_a_direct_loop() -> None:
    hr = make_image(19, 23)
    sr = worse(hr, 30)
    assert ssim_y(hr, sr, 2) == pytest.approx(ssim_by_loop(to_luma(hr)[2:-2, 2:-2], to_luma(sr)[2:-2, 2:-2]), abs=1e-12)
    gray, other = hr[..., 0], sr[..., 0]
    assert ssim_y(gray, other, 0) == pytest.approx(ssim_by_loop(gray.astype(float), other.astype(float)), abs=1e-12)


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    dark, bright = np.full((11, 11), 50, dtype=np.uint8), np.full((11, 11), 200, dtype=np.uint8)
    assert ssim_y(dark, bright, 0) == pytest.approx((2 * 50 * 200 + 2.55**2) / (50**2 + 200**2 + 2.55**2), abs=1e-9)


def test_ssim_is_symmetric_one_for_equals_and_falls_with_noise() -> None:
    hr = make_image()
    assert ssim_y(hr, hr, 3) == pytest.approx(1, abs=1e-12)
    assert ssim_y(hr, worse(hr), 3) == pytest.approx(ssim_y(worse(hr), hr, 3), abs=1e-12)
    scores = [ssim_y(hr, worse(hr, scale), 3) for scale in (2, 8, 32)]
    assert 1 > scores[0] > scores[1] > scores[2] > 0


def test_cropped_pixels_do_not_count() -> None:
    hr = make_image()
    sr = hr.copy()
    sr[:4], sr[-4:], sr[:, :4], sr[:, -4:] = 0, 0, 0, 0
    assert psnr_y(hr, sr, 4) == math.inf and ssim_y(hr, sr, 4) == pytest.approx(1, abs=1e-12)
    assert psnr_y(hr, sr, 3) < 40 and ssim_y(hr, sr, 3) < 1


def test_pil_images_score_as_their_arrays() -> None:
    hr = make_image()
    sr = worse(hr)
    assert psnr_y(Image.fromarray(hr), Image.fromarray(sr), 2) == psnr_y(hr, sr, 2)
    assert ssim_y(Image.fromarray(hr[..., 0]), Image.fromarray(sr[..., 0]), 2) == ssim_y(hr[..., 0], sr[..., 0], 2)


def test_gray_stored_as_rgb_scores_higher() -> None:
    gray = make_image()[..., 0]
    other = worse(gray)
    as_rgb = psnr_y(np.stack([gray] * 3, axis=-1), np.stack([other] * 3, axis=-1), 2)
    assert as_rgb - psnr_y(gray, other, 2) == pytest.approx(1.3219, abs=1e-4)


def test_images_that_cannot_be_compared_are_an_error() -> None:
    image = make_image()
    for metric in (psnr_y, ssim_y):
        with pytest.raises(ValueError, match="differ in size"):
            metric(image, image[:-1], 0)
        with pytest.raises(ValueError, match="differ in size or channels"):
            metric(image, image[..., 0], 0)
        with pytest.raises(ValueError, match="sr must be uint8, found float64"):
            metric(image, image / 255, 0)
        with pytest.raises(ValueError, match=r"hr must be .* found shape \(40, 53, 4\)"):
            metric(np.zeros((40, 53, 4), dtype=np.uint8), image, 0)
        with pytest.raises(ValueError, match="mode P"):
            metric(Image.fromarray(image).convert("P"), image, 0)
        with pytest.raises(ValueError, match="crop -1"):
            metric(image, image, -1)
        with pytest.raises(ValueError, match="crop 20 of 40x53 pixels"):
            metric(image, image, 20)
    assert psnr_y(image, image, 19) == math.inf
    assert ssim_y(image, image, 14) == pytest.approx(1)
    with pytest.raises(ValueError, match="leave 11x11"):
        ssim_y(image, image, 15)
