"""The upscaler: bicubic interpolation at first, better than it when trained, deterministic, and unchanged by saving."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cm3leon.config.schema import SuperResolutionConfig
from cm3leon.evaluation.upscaling import psnr_rgb, restoration_scores
from cm3leon.models.super_resolution import SuperResolution, reduce
from cm3leon.training.super_resolution import train

CONFIG = SuperResolutionConfig(scale=2, channels=32, blocks=2, patch_size=12, steps=150, batch_size=8, learning_rate=6e-3)


class Discs:
    """Yellow discs with hard edges on dark blue."""

    size = 32

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:32, :32]
        self.pixels = np.empty((count, 32, 32, 3), dtype=np.uint8)
        for pixels in self.pixels:
            (cx, cy), radius = rng.integers(8, 24, size=2), rng.integers(4, 9)
            inside = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
            pixels[:] = np.where(inside[..., None], (240, 200, 60), (20, 40, 120))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        return self.pixels[positions]


@pytest.fixture(scope="module")
def model() -> SuperResolution:
    return train(CONFIG, Discs(64, 0), seed=0)


def test_an_untrained_network_is_bicubic() -> None:
    scores = restoration_scores(SuperResolution(3, 8, 1), Sized(Discs(4, 1), 30))
    assert len(scores["psnr_rgb"]) == 4 and scores["psnr_rgb"] == pytest.approx(scores["psnr_rgb_bicubic"], abs=1e-6)


class Sized:
    """Images cropped to a side that the scale divides."""

    def __init__(self, images: Discs, size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        return self.images[positions][:, : self.size, : self.size]


def test_beats_bicubic_on_held_out_images(model: SuperResolution) -> None:
    scores = restoration_scores(model, Discs(24, 1))
    assert np.mean(scores["psnr_rgb"]) > np.mean(scores["psnr_rgb_bicubic"]) + 1


def test_the_same_seed_gives_the_same_bytes(model: SuperResolution, tmp_path: Path) -> None:
    model.save(tmp_path / "a")
    train(CONFIG, Discs(64, 0), seed=0).save(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_saving_loading_and_upscaling(model: SuperResolution, tmp_path: Path) -> None:
    model.save(tmp_path)
    loaded = SuperResolution.load(tmp_path)
    images = [Image.fromarray(Discs(1, 2).pixels[0]), Image.new("RGBA", (10, 7), (255, 0, 0, 0)), Image.new("L", (5, 9))]
    large = loaded.upscale(images)
    assert [image.size for image in large] == [(64, 64), (20, 14), (10, 18)]
    assert all(image.mode == "RGB" for image in large)
    for mine, theirs in zip(model.upscale(images), large, strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))
    with pytest.raises(FileNotFoundError, match="cm3leon super_resolution"):
        SuperResolution.load(tmp_path / "absent")


def test_transparent_pixels_become_white() -> None:
    large = SuperResolution(2, 4, 1).upscale([Image.new("RGBA", (10, 7), (255, 0, 0, 0))])
    assert np.asarray(large[0]).min() == 255


def test_psnr() -> None:
    black, gray = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.full((2, 3, 4, 4), 10, dtype=torch.uint8)
    assert psnr_rgb(black, gray) == pytest.approx(10 * np.log10(255**2 / 100))
    assert psnr_rgb(black, black) == 100


def test_reduction_keeps_a_flat_image_and_refuses_sides_that_are_no_multiple() -> None:
    flat = torch.full((1, 3, 12, 12), 77, dtype=torch.uint8)
    assert torch.equal(reduce(flat, 3), torch.full((1, 3, 4, 4), 77, dtype=torch.uint8))
    with pytest.raises(ValueError, match="cannot be reduced 5 times"):
        reduce(flat, 5)


def test_refuses_to_train_on_nothing() -> None:
    with pytest.raises(ValueError, match="no images"):
        train(CONFIG, Discs(0, 0), seed=0)
