"""Conversions between uint8 and [-1, 1]."""

import numpy as np
import torch

from cm3leon.models.pixels import to_channels_first, to_channels_last, to_pil, to_uint8, to_unit


def test_bytes_survive_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_unit(pixels)), pixels)


def test_images_survive_the_round_trip_and_values_outside_are_clamped() -> None:
    pixels = torch.randint(256, (2, 5, 7, 3), dtype=torch.uint8)
    batch = to_channels_first(pixels)
    assert batch.shape == (2, 3, 5, 7) and batch.min() >= -1 and batch.max() <= 1
    assert torch.equal(to_channels_last(batch), pixels)
    assert all(np.array_equal(np.asarray(image), array) for image, array in zip(to_pil(batch), pixels.numpy(), strict=True))
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
