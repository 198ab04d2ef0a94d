"""The bi-encoder: unit vectors, exact saving, and training that learns and is deterministic."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cm3leon.config.profiles import load_profile, profile_names
from cm3leon.config.schema import EncoderConfig
from cm3leon.models.clip import ClipTokenizer, Encoder, _check_activation, embed_ids
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.training import clip
from cm3leon.training.clip import HardNegatives, contrastive_loss
from cm3leon.utils import torchvision_compat
from cm3leon.utils.errors import ConfigError

COLORS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "white": (250, 250, 250), "black": (5, 5, 5)}
CONFIG = EncoderConfig(
    image_tower="vit", image_size=16, patch_size=8, width=32, layers=1, text_width=32, text_layers=1, embedding_dim=16, vocabulary_size=300,
    context_length=16, steps=120, batch_size=16, warmup_steps=5, learning_rate=3e-3,
)  # fmt: skip


class Halves:
    """Images whose upper and lower halves have two colors, and captions that say which."""

    def __init__(self) -> None:
        pairs = [(a, b) for a in COLORS for b in COLORS if a != b]
        self.captions = [[f"{a} above {b}", f"{b} below {a}"] for a, b in pairs]
        self.pixels = np.zeros((len(pairs), 16, 16, 3), dtype=np.uint8)
        for pixels, (a, b) in zip(self.pixels, pairs, strict=True):
            pixels[:8], pixels[8:] = COLORS[a], COLORS[b]
        self.images = [Image.fromarray(pixels) for pixels in self.pixels]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        return self.pixels[positions]


@pytest.fixture(scope="module")
def halves() -> Halves:
    return Halves()


@pytest.fixture(scope="module")
def encoder(halves: Halves) -> Encoder:
    return clip.train(CONFIG, halves, halves.captions, seed=0)


def test_learns_to_match(halves: Halves, encoder: Encoder) -> None:
    """Both colors are right for nearly every caption; which one is above takes longer to learn and is not tested."""
    captions = [c[0] for c in halves.captions]
    similarity = encoder.encode_texts(captions) @ encoder.encode_images(halves.images).T
    found = [sorted(captions[i].split()) == sorted(caption.split()) for i, caption in zip(similarity.argmax(axis=1), captions, strict=True)]
    assert np.mean(found) > 0.8


def test_vectors_have_length_one(halves: Halves, encoder: Encoder) -> None:
    for vectors in (encoder.encode_images(halves.images), encoder.encode_texts(["red", "", "blue above red " * 50])):
        assert vectors.dtype == np.float32
        assert vectors.shape[1] == encoder.dimensions == 16
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(vectors)), abs=1e-5)
    assert encoder.encode_images([]).shape == encoder.encode_texts([]).shape == (0, 16)


def test_images_of_any_size_and_mode(halves: Halves, encoder: Encoder) -> None:
    large = halves.images[0].resize((64, 64), Image.Resampling.NEAREST)
    vectors = encoder.encode_images([halves.images[0], large, large.convert("RGBA"), Image.new("L", (40, 9))])
    assert vectors[1] == pytest.approx(vectors[0], abs=0.02)
    assert vectors[2] == pytest.approx(vectors[1], abs=1e-6)


def test_the_other_texts_of_a_batch_do_not_change_a_vector(encoder: Encoder) -> None:
    alone = encoder.encode_texts(["red above blue"])
    together = encoder.encode_texts(["red above blue", "red above blue below green above white below black above red"])
    assert together[0] == pytest.approx(alone[0], abs=1e-5)
    ids = encoder.tokenizer(["red above blue", "green"])
    assert embed_ids(encoder.model, ids).numpy() == pytest.approx(encoder.model.encode_text(ids, normalize=True).numpy(), abs=1e-5)


def test_the_same_seed_gives_the_same_bytes(halves: Halves, encoder: Encoder, tmp_path: Path) -> None:
    encoder.save(tmp_path / "a")
    clip.train(CONFIG, halves, halves.captions, seed=0).save(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_saving_and_loading(halves: Halves, encoder: Encoder, tmp_path: Path) -> None:
    encoder.save(tmp_path)
    loaded = Encoder.load(tmp_path)
    assert loaded.fingerprint == encoder.fingerprint
    assert np.array_equal(loaded.encode_images(halves.images), encoder.encode_images(halves.images))
    assert np.array_equal(loaded.encode_texts(["red above blue"]), encoder.encode_texts(["red above blue"]))
    with torch.no_grad():
        loaded.model.logit_scale.add_(1)
    assert loaded.fingerprint != encoder.fingerprint


def test_pretrained_weights_from_a_checkpoint(halves: Halves, tmp_path: Path, tiny_architecture: str) -> None:
    """A checkpoint of an open_clip architecture is read, saved, and loaded again when the checkpoint is gone."""
    import open_clip
    from safetensors.torch import save_file

    save_file(open_clip.create_model(tiny_architecture).state_dict(), tmp_path / "weights.safetensors")
    encoder = Encoder.pretrained(tiny_architecture, str(tmp_path / "weights.safetensors"))
    encoder.save(tmp_path / "saved")
    (tmp_path / "weights.safetensors").unlink()
    loaded = Encoder.load(tmp_path / "saved")
    assert loaded.fingerprint == encoder.fingerprint
    assert np.array_equal(loaded.encode_images(halves.images[:3]), encoder.encode_images(halves.images[:3]))
    assert np.array_equal(loaded.encode_texts(["a red circle"]), encoder.encode_texts(["a red circle"]))
    with pytest.raises(ValueError, match="no such architecture"):
        Encoder.pretrained("nothing-like-it", "x")
    with pytest.raises(ValueError, match="neither a file nor a tag"):
        Encoder.pretrained(tiny_architecture, str(tmp_path / "absent.pt"))


def test_every_published_weight_is_refused_or_built_with_the_activation_it_was_trained_with() -> None:
    torchvision_compat.make_importable()
    import open_clip

    refused = []
    for architecture, tag in open_clip.list_pretrained():
        built, trained = open_clip.get_model_config(architecture), open_clip.pretrained.get_pretrained_cfg(architecture, tag)
        # The reverse, weights trained with GELU for a QuickGELU architecture, is not published: roberta's were trained as it is built.
        assert not built.get("quick_gelu") or trained.get("quick_gelu") or architecture.startswith("roberta")
        try:
            _check_activation(architecture, tag)
        except ConfigError as error:
            refused.append((architecture, tag))
            advised = str(error).rpartition("=")[2]
            assert open_clip.get_model_config(advised)["quick_gelu"] and tag in open_clip.list_pretrained_tags_by_model(advised)
    assert ("ViT-B-32", "openai") in refused and ("ViT-B-32", "laion2b_s34b_b79k") not in refused
    with pytest.raises(ConfigError, match=r"QuickGELU, which ViT-B-32 does not have; set encoder\.pretrained_model=ViT-B-32-quickgelu"):
        Encoder.pretrained("ViT-B-32", "openai")


@pytest.mark.parametrize("profile", profile_names())
def test_the_profiles_name_published_weights_that_fit(profile: str) -> None:
    torchvision_compat.make_importable()
    import open_clip

    encoder = load_profile(profile).encoder
    if encoder.pretrained_model is None:
        pytest.skip("trains its own")
    assert encoder.pretrained_weights in open_clip.list_pretrained_tags_by_model(encoder.pretrained_model)
    _check_activation(encoder.pretrained_model, str(encoder.pretrained_weights))


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cm3leon encoder"):
        Encoder.load(tmp_path)


def test_the_end_token_has_the_highest_id_and_is_never_truncated() -> None:
    tokenizer = ClipTokenizer(TextTokenizer.train(["red above blue"] * 3, 300), 8)
    ids = tokenizer(["red", "red above blue " * 20, ""])
    assert ids.shape == (3, 8)
    assert (ids.max(dim=1).values == tokenizer.end).all()
    assert ids.argmax(dim=1).tolist()[1:] == [7, 1]
    assert int(ids.max()) == tokenizer.size - 1


def test_hard_negatives_differ_in_one_word_or_by_one_swap() -> None:
    import random

    captions = [f"a {c} circle {r} a {d} square" for c in ("red", "blue") for d in ("red", "blue") for r in ("above", "below")]
    negatives, rng = HardNegatives(captions), random.Random(0)
    found = {negatives(captions[2], rng) for _ in range(200)}  # a red circle above a blue square
    assert not found & {captions[2], None}
    for caption in found:
        changed = [(x, y) for x, y in zip(captions[2].split(), caption.split(), strict=True) if x != y]
        assert len(changed) == 1 or sorted(x for x, _ in changed) == sorted(y for _, y in changed)
    assert "a blue circle above a red square" in found
    assert "a red circle below a blue square" in found
    assert negatives("entirely unknown words", rng) is None
    assert negatives("", rng) is None


def test_loss_without_hard_negatives_is_infonce() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text, hard = (torch.nn.functional.normalize(torch.randn(n, 4, generator=generator), dim=1) for n in (5, 5, 2))
    none, scale = torch.zeros(0, 4), torch.tensor(7.0)
    logits = 7 * image @ text.T
    expected = -(logits.log_softmax(1).diag().mean() + logits.log_softmax(0).diag().mean()) / 2
    assert contrastive_loss(image, text, none, torch.zeros(0, dtype=torch.long), scale).item() == pytest.approx(expected.item(), rel=1e-5)
    own = logits.clone()
    with_hard = torch.cat([own, torch.full((5, 2), -torch.inf)], dim=1)
    with_hard[3, 5], with_hard[0, 6] = 7 * image[3] @ hard[0], 7 * image[0] @ hard[1]
    expected = -(with_hard.log_softmax(1)[:, :5].diag().mean() + logits.log_softmax(0).diag().mean()) / 2
    assert contrastive_loss(image, text, hard, torch.tensor([3, 0]), scale).item() == pytest.approx(expected.item(), rel=1e-5)


def test_refuses_images_without_captions(halves: Halves) -> None:
    with pytest.raises(ValueError, match="needs a caption"):
        clip.train(CONFIG, halves, [[] for _ in halves.captions], seed=0)
    with pytest.raises(ValueError, match="caption lists"):
        clip.train(CONFIG, halves, halves.captions[:3], seed=0)


@pytest.mark.slow
def test_torchvision_imports_in_a_fresh_process() -> None:
    """Once and twice, before torchvision and open_clip."""
    code = (
        "from cm3leon.utils.torchvision_compat import make_importable as m; a = m(); assert m() == a;"
        "import torchvision.transforms, open_clip;"
        "from PIL import Image; print(torchvision.transforms.ToTensor()(Image.new('RGB', (3, 2))).shape)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "[3, 2, 3]" in result.stdout


def test_either_tower_saves_and_loads(halves: Halves, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"image_tower": "resnet", "image_size": 32, "width": 8, "steps": 2})
    large = Halves()
    large.pixels = large.pixels.repeat(2, axis=1).repeat(2, axis=2)
    encoder = clip.train(config, large, large.captions, seed=0)
    encoder.save(tmp_path)
    assert np.array_equal(Encoder.load(tmp_path).encode_images(halves.images), encoder.encode_images(halves.images))
    alone, together = encoder.encode_images(halves.images[:1]), encoder.encode_images(halves.images)
    assert together[0] == pytest.approx(alone[0], abs=1e-5)  # no statistics of the batch


def test_sizes_a_tower_cannot_take_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        EncoderConfig(image_size=48)
    with pytest.raises(ValueError, match="multiple of 7"):
        EncoderConfig(image_size=48, image_tower="vit", patch_size=7)
