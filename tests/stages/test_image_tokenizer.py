"""The images that the image tokenizer is trained on, and an imported one."""

import pandas as pd
import pytest

from cm3leon.config.schema import Config
from cm3leon.models.vqgan import ImageTokenizer, ImageTokenizerSpec
from cm3leon.stages.image_tokenizer import make_tokenizer, training_images
from cm3leon.tracking.runs import Run
from cm3leon.utils.errors import ConfigError
from cm3leon.utils.world import ALONE


def test_an_imported_one_of_another_image_size_than_the_parameters_say_is_refused(tmp_path):
    spec = ImageTokenizerSpec(
        image_size=16, patch=2, channels=8, multipliers=(1, 1), blocks=1, decoder_blocks=1, embedding_dim=4, codebook_size=8
    )
    ImageTokenizer(spec).save(tmp_path)
    changes = {"pretrained": str(tmp_path), "image_size": 16}
    assert make_tokenizer(Config.model_validate({"image_tokenizer": changes}), ALONE, Run())[0].spec == spec
    with pytest.raises(ConfigError, match=r"has images of 16 px, image_tokenizer\.image_size is 32: set it to 16"):
        make_tokenizer(Config.model_validate({"image_tokenizer": changes | {"image_size": 32}}), ALONE, Run())


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.2, 5), (0.5, 20), (0.9, 40)])
def test_condition_images_are_a_share_of_all_and_no_record_is_left_out(share, count):
    conditions = [[{"kind": "depth", "image": f"depth {n}"}, {"kind": "hed", "image": f"hed {n}"}] for n in range(20)]
    manifest = pd.DataFrame({"image": [f"image {n}" for n in range(20)], "conditions": conditions})
    found = training_images(manifest, share, 0)
    assert found[:20] == manifest["image"].tolist()
    assert len(found[20:]) == len(set(found[20:])) == count
    assert set(found[20:]) <= {item["image"] for items in conditions for item in items}
    assert training_images(manifest, share, 0) == found
