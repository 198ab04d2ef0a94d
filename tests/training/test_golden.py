"""Loss curves of profile ``tiny``, on made-up documents and images, kept in ``golden.json``: no change of training goes unnoticed.

``python tests/training/test_golden.py`` writes the curves again, after a change that is meant to change them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests_support import make_documents
from trainers_support import KINDS, Squares, every_step, tokenizer_of

from cm3leon.config.profiles import load_profile
from cm3leon.data.batches import SampleStream, TokenStream
from cm3leon.data.sequences import PretrainingSamples
from cm3leon.data.tokens import TokenStore, write_tokens
from cm3leon.models.decoder import Decoder, DecoderSpec
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.training import loop
from cm3leon.training.clip import EncoderTrainer
from cm3leon.training.super_resolution import SuperResolutionTrainer
from cm3leon.training.trainer import fit, setup
from cm3leon.training.vqgan import ImageTokenizerTrainer
from cm3leon.utils.world import World

GOLDEN = Path(__file__).with_name("golden.json")
CONFIGS = Path(__file__).parents[2] / "configs"
VOCABULARY = Vocabulary(text_size=100, image_size=50, sentinels=16, tokens_per_image=16)
TOLERANCE = 5e-3
"""Processors round sums differently, and training amplifies the differences."""


def curve(directory: Path, packing: bool) -> list[float]:
    config = load_profile("tiny", configs=CONFIGS)
    section = config.pretrain.model_copy(update={"steps": 50, "packing": packing})
    write_tokens(directory, "train", make_documents(60), 16, 100)
    store = TokenStore(directory)
    neighbors = {name: [store.ids[(row + i) % len(store)] for i in (1, 2)] for row, name in enumerate(store.ids)}
    context = section.model.context
    samples = PretrainingSamples(store, store, neighbors, VOCABULARY, section.objective, section.retrieved_documents, context, config.seed)
    stream = (
        TokenStream(samples, len(store), section.batch_size, config.seed, context)
        if packing
        else SampleStream(samples, len(store), section.batch_size, config.seed)
    )
    torch.manual_seed(config.seed)
    model = Decoder(DecoderSpec.from_config(section.model), VOCABULARY)
    state = setup(model, section)
    fit(state, stream, section, {}, "golden")
    return state.losses


def image_curve(kind: str) -> list[float]:
    config: Any = getattr(load_profile("tiny", configs=CONFIGS), kind)
    if kind == "encoder":
        config = config.model_copy(update={"image_tower": "vit", "width": 64, "batch_size": 16})
    images, losses = Squares(70, 32), []
    trainer: Any = {
        "image_tokenizer": lambda: ImageTokenizerTrainer(config, images, 0),
        "encoder": lambda: EncoderTrainer(config, images, images.captions, tokenizer_of(config, images), 0),
        "super_resolution": lambda: SuperResolutionTrainer(config, images, 0),
    }[kind]()

    def log(metrics: dict[str, float], step: int) -> None:
        if "loss" in metrics:  # the last are of the whole run
            losses.append(metrics["loss"])

    with every_step():
        loop.train(trainer, config.steps, kind, World(), log)
    return losses


@pytest.mark.parametrize("packing", [False, True], ids=["samples", "packed"])
def test_the_loss_curve_is_the_golden_one(tmp_path, packing):
    expected = json.loads(GOLDEN.read_text())["packed" if packing else "samples"]
    found = curve(tmp_path, packing)
    assert len(found) == len(expected) == 50
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert found[-1] < found[0] - 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_curve_of_an_image_trainer_is_the_golden_one(kind):
    assert image_curve(kind) == pytest.approx(json.loads(GOLDEN.read_text())[kind], abs=TOLERANCE)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        curves = {"samples": curve(Path(one), False), "packed": curve(Path(two), True)} | {kind: image_curve(kind) for kind in KINDS}
    GOLDEN.write_text(json.dumps({name: [round(loss, 6) for loss in losses] for name, losses in curves.items()}) + "\n")
