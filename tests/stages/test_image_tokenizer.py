"""The images that the image tokenizer is trained on."""

import pandas as pd
import pytest

from cm3leon.stages.image_tokenizer import training_images


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.2, 5), (0.5, 20), (0.9, 40)])
def test_condition_images_are_a_share_of_all_and_no_record_is_left_out(share, count):
    conditions = [[{"kind": "depth", "image": f"depth {n}"}, {"kind": "hed", "image": f"hed {n}"}] for n in range(20)]
    manifest = pd.DataFrame({"image": [f"image {n}" for n in range(20)], "conditions": conditions})
    found = training_images(manifest, share, 0)
    assert found[:20] == manifest["image"].tolist()
    assert len(found[20:]) == len(set(found[20:])) == count
    assert set(found[20:]) <= {item["image"] for items in conditions for item in items}
    assert training_images(manifest, share, 0) == found
