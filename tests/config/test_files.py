"""Which files parameters name."""

from __future__ import annotations

from pathlib import Path

import pytest

from cm3leon.config import paths
from cm3leon.config.files import check_files, named_files
from cm3leon.config.profiles import load_profile, profile_names
from cm3leon.config.schema import Config
from cm3leon.utils.errors import ConfigError


def test_only_what_a_run_reads_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = paths.WEIGHTS / "vgg16.safetensors"
    weights.parent.mkdir(parents=True)
    tokenizer = {"perceptual_weights": str(weights)}
    assert named_files(Config.model_validate({"image_tokenizer": tokenizer})) == {}  # its weight is 0
    used = Config.model_validate({"image_tokenizer": {**tokenizer, "perceptual_weight": 1.0}})
    with pytest.raises(ConfigError, match=r"not there: image_tokenizer\.perceptual_weights .*vgg16\.safetensors\. Put the files there"):
        check_files(used)
    weights.touch()
    check_files(used)


@pytest.mark.parametrize("elsewhere", ["vgg16.safetensors", "data/weights/../vgg16.safetensors", "/dev/null", "data/weights"])
def test_weights_are_refused_where_dvc_would_not_notice_a_change(elsewhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths.WEIGHTS.mkdir(parents=True)
    place = Path(elsewhere)
    if not place.exists():
        place.touch()
    with pytest.raises(ConfigError, match=rf"not in data/weights, .*: image_tokenizer\.perceptual_weights {elsewhere}\. Move the files"):
        check_files(Config.model_validate({"image_tokenizer": {"perceptual_weights": elsewhere, "perceptual_weight": 1.0}}))
    link = paths.WEIGHTS / "link"
    link.symlink_to(place.absolute())
    check_files(Config.model_validate({"image_tokenizer": {"perceptual_weights": str(link), "perceptual_weight": 1.0}}))


def test_a_tag_is_no_file_and_a_checkpoint_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clip").touch()
    files = [
        ("laion2b_s34b_b79k", {}),
        *((file, {"encoder.pretrained_weights": file}) for file in ("data/weights/clip.pt", "clip.pt", "clip")),
    ]
    for weights, found in files:
        config = Config.model_validate({"encoder": {"pretrained_model": "ViT-B-32", "pretrained_weights": weights}})
        assert named_files(config) == found


def test_the_default_profiles_name_no_files_and_the_papers_those_that_they_state() -> None:
    named = {profile: named_files(load_profile(profile)) for profile in profile_names()}
    assert named["tiny"] == named["small"] == {}
    assert named["cm3leon-7b"] == {"image_tokenizer.perceptual_weights": "data/weights/vgg16_features.safetensors"}
