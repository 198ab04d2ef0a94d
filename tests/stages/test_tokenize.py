"""Where the tokenizer's encoder computes in bfloat16: only if the codes stay the same."""

import numpy as np
import pytest
import torch

from cm3leon.config.schema import ImageTokenizerConfig
from cm3leon.models.pixels import to_channels_first
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.stages.tokenize import MIN_AGREEMENT, choose_dtype, own_rows
from cm3leon.training.vqgan import make_spec
from cm3leon.utils.world import World

CPU = torch.device("cpu")


@pytest.fixture
def model() -> ImageTokenizer:
    torch.manual_seed(0)
    spec = make_spec(ImageTokenizerConfig(image_size=32, channels=16, embedding_dim=8, codebook_size=8, blocks=1))
    return ImageTokenizer(spec).eval()


def test_bfloat16_is_chosen_if_the_codes_stay_the_same(model: ImageTokenizer) -> None:
    colors = np.random.default_rng(0).integers(0, 2, size=(40, 1, 1, 3)) * 255
    pixels = torch.from_numpy(np.broadcast_to(colors, (40, 32, 32, 3)).astype(np.uint8))
    latents = model.encoder(to_channels_first(pixels)).detach()[:, :, 0, 0]
    model.codebook.entries.copy_(latents.unique(dim=0))  # one entry for each of the eight colors
    assert choose_dtype(model, pixels.split(16), CPU) == (torch.bfloat16, 1.0)


def test_float32_is_kept_if_entries_are_nearer_to_one_another_than_bfloat16_can_tell(model: ImageTokenizer) -> None:
    pixels = torch.randint(200, 203, (40, 32, 32, 3), dtype=torch.uint8)
    model.codebook.entries.copy_(model.encoder(to_channels_first(pixels[:8])).detach()[:, :, 0, 0])
    images = to_channels_first(pixels)
    expected = (model.encode(images, torch.bfloat16) == model.encode(images)).double().mean().item()
    dtype, share = choose_dtype(model, pixels.split(16), CPU)
    assert dtype == torch.float32 and share == pytest.approx(expected)
    assert 0.1 < share < MIN_AGREEMENT


def test_whole_shards_are_dealt_to_the_processes() -> None:
    assert [own_rows(8, 3, World(rank, 3)) for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [own_rows(8, 2, World(rank, 3)) for rank in range(3)] == [[0, 1, 6, 7], [2, 3], [4, 5]]
    assert [own_rows(2, 4, World(rank, 2)) for rank in range(2)] == [[0, 1], []]
