"""Sheets of images."""

import numpy as np
import pytest
from PIL import Image

from cm3leon.evaluation.image_tasks import OUTLINED_SIDE, _outlined
from cm3leon.utils.images import save_captioned


def test_rows_are_as_high_as_their_longest_caption_and_images_are_in_order(tmp_path):
    colors = ["red", "lime", "blue", "black"]
    images = [Image.new("RGB", (4, 4), color) for color in colors]

    def height(captions):
        save_captioned(images, captions, tmp_path / "sheet.png", columns=2, cell=40)
        return Image.open(tmp_path / "sheet.png").height

    line = height(["one", "one", "one", "two two two two"]) - height(["one"] * 4)
    assert line > 0
    assert height(["two two two two", "one", "one", "two two two two"]) == height(["one"] * 4) + 2 * line
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    first = [np.argwhere((sheet == Image.new("RGB", (1, 1), color).getpixel((0, 0))).all(-1)).min(0) for color in colors[:3]]
    assert first[0][0] == first[1][0] < first[2][0] and first[0][1] == first[2][1] < first[1][1]


@pytest.mark.parametrize("count", [4, 8, 12, 24, 48])
def test_a_sheet_is_about_square(tmp_path, count):
    save_captioned([Image.new("RGB", (4, 4))] * count, ["a red circle left of a small blue square"] * count, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert 0.75 < sheet.width / sheet.height < 1.34


def test_boxes_are_outlined_at_their_coordinates():
    shown = np.asarray(_outlined(Image.new("RGB", (64, 64)), [(0.25, 0.5, 0.75, 1.0)]))
    ys, xs = np.nonzero((shown == (255, 0, 255)).all(-1))
    found = np.array([xs.min(), ys.min(), xs.max(), ys.max()]) / (OUTLINED_SIDE - 1)
    np.testing.assert_allclose(found, (0.25, 0.5, 0.75, 1.0), atol=1 / OUTLINED_SIDE)
    assert not shown[OUTLINED_SIDE * 3 // 4, OUTLINED_SIDE // 2].any()
