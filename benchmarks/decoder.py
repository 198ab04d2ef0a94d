"""Compare settings of pretraining by short runs on the tokens of the last pipeline run:

    python benchmarks/decoder.py --steps 600 "pretrain.optimizer=adamw pretrain.learning_rate=0.003" "pretrain.learning_rate=0.01"

Each argument is one variant: changes to ``params.yaml``, separated by spaces. The table has a row for each, measured on the val split:

- steps per second of training;
- losses without masks: nats per image given its caption, and nats per caption token given the image;
- composition accuracy of one unranked image for each prompt, also by the number of different objects that the prompt names, and
  "relation": how often a stated relation holds if number and colors are right (chance: about 0.25);
- "binding": how often an image of two objects is more likely given its caption than given it with swapped colors (chance: 0.5);
- for each relation, how often an image is more likely given a caption that states it than given the opposite (chance: 0.5), and by how
  many nats (median).

``--decoder DIR`` measures a trained decoder instead, as ``models/pretrained``: all but the losses.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from cm3leon.config import paths
from cm3leon.config.profiles import changed_config
from cm3leon.config.schema import Config, DecodingConfig, ObjectiveConfig
from cm3leon.data.batches import Batch, SampleStream
from cm3leon.data.manifest import read_manifest
from cm3leon.data.tokens import TokenStore
from cm3leon.generation.engine import generate_images, log_likelihoods
from cm3leon.generation.prompts import image_prompt
from cm3leon.generation.sampling import Sampler
from cm3leon.models.decoder import Decoder
from cm3leon.models.pixels import to_pil
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.scenes import composition
from cm3leon.scenes.scene import COLORS, OPPOSITE, SHAPES
from cm3leon.sequence.grammar import Prompt
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.training.pretraining import build_decoder, training_samples
from cm3leon.training.trainer import fit, setup, validate

IMAGES_AT_ONCE = 128


def held_out_batches(model: Decoder, config: Config, objective: ObjectiveConfig) -> list[Batch]:
    """The val split once, without retrieved documents, with the masks of ``objective``."""
    section = config.pretrain.model_copy(update={"objective": objective, "retrieved_documents": [1.0]})
    store = TokenStore(paths.TOKENS, ["val"])
    stream = SampleStream(training_samples(store, model.vocabulary, section, config.seed), len(store), 64, config.seed)
    return [stream(step) for step in range(max(1, len(store) // 64))]


def composition_by_objects(model: Decoder) -> dict[str, float]:
    """Composition accuracy of one image, sampled without guidance, for each val prompt.

    Returns:
        By key: ``all``; ``1``, ``2``, ``3``, the prompts that name so many different objects; ``relation``, the relation alone where number
        and colors are right.
    """
    images, texts = ImageTokenizer.load(paths.IMAGE_TOKENIZER), TextTokenizer.load(paths.TEXT_TOKENIZER)
    # 1. One image for each prompt.
    captions = [str(found[0]) for found in read_manifest(paths.VALIDATED, "val")["captions"]]
    vocabulary = model.vocabulary
    prompts = [[image_prompt([("text", vocabulary.text(texts.encode(caption)))], [], vocabulary)] for caption in captions]
    plain = Sampler(DecodingConfig(temperature=1.0, top_p=1.0, guidance=1.0))
    outcomes = []
    for start in range(0, len(prompts), IMAGES_AT_ONCE):
        batch = slice(start, start + IMAGES_AT_ONCE)
        seeds = [[row] for row in range(start, start + len(prompts[batch]))]
        codes = generate_images(model, prompts[batch], seeds, plain)[:, 0]
        outcomes += composition.check_images(captions[batch], to_pil(images.decode(torch.from_numpy(codes))))

    # 2. Outcomes by key.
    right = defaultdict(list)
    for caption, outcome in zip(captions, outcomes, strict=True):
        if outcome is not None and (statement := composition.parse_caption(caption)) is not None:
            for key in ("all", str(len(set(statement.objects)))):
                right[key].append(all(outcome.values()))
            if "relation" in outcome and outcome["count"] and outcome["color"]:
                right["relation"].append(outcome["relation"])
    return {key: float(np.mean(values)) for key, values in sorted(right.items())}


def swapped_colors(caption: str) -> str | None:
    """The caption with the colors of its two objects swapped; None unless it has two objects of different colors and shapes."""
    object_ = rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b"
    found = re.findall(object_, caption)
    if len(found) != 2 or len({color for color, _ in found}) < 2 or len({shape for _, shape in found}) < 2:
        return None
    other = {found[0][0]: found[1][0], found[1][0]: found[0][0]}
    return re.sub(object_, lambda match: f"{other[match[1]]} {match[2]}", caption)


def opposite_relation(caption: str) -> str | None:
    """The caption with its relation turned round, as "left of" to "right of"; None if it states none."""
    for word, opposite in OPPOSITE.items():
        if word in caption:
            return caption.replace(word, opposite)
    return None


def _gains(model: Decoder, changed: Callable[[str], str | None]) -> tuple[list[str], np.ndarray]:
    """For each caption of val that ``changed`` changes: by how many nats its image is more likely given the caption than given the change.

    Returns:
        The captions, and the gains of the same length.
    """
    texts = TextTokenizer.load(paths.TEXT_TOKENIZER)
    store = TokenStore(paths.TOKENS, ["val"])
    vocabulary = model.vocabulary
    rows = read_manifest(paths.VALIDATED, "val")
    found = [
        (store.by_id(name).codes, str(caption), other)
        for name, captions in zip(rows["id"], rows["captions"], strict=True)
        for caption in captions
        if (other := changed(str(caption))) is not None
    ]
    images = [Prompt(vocabulary.image(codes), np.arange(1, vocabulary.tokens_per_image + 1)) for codes, _, _ in found]
    likelihoods = []
    for which in (1, 2):
        prompts = [image_prompt([("text", vocabulary.text(texts.encode(str(item[which]))))], [], vocabulary) for item in found]
        likelihoods.append(np.array([float(scores.sum()) for scores in log_likelihoods(model, prompts, images)]))
    return [caption for _, caption, _ in found], likelihoods[0] - likelihoods[1]


def binding(model: Decoder) -> float:
    """Fraction of val captions of two objects given which their image is more likely than given them with the colors swapped."""
    _, gains = _gains(model, swapped_colors)
    return float(np.mean(gains > 0)) if len(gains) else float("nan")


def relations(model: Decoder) -> str:
    """By relation: the share of val captions given which their image is more likely than given the opposite; the median gain in nats."""
    captions, gains = _gains(model, opposite_relation)
    stated = np.array([next(word for word in OPPOSITE if word in caption) for caption in captions])
    return ", ".join(
        f"{word}: {np.mean(gains[stated == word] > 0):.2f} by {np.median(gains[stated == word]):.1f}"
        for word in OPPOSITE
        if (stated == word).any()
    )


def trial(changes: Sequence[str], steps: int) -> str:
    """Train one variant and return its row of the table."""
    config = changed_config([*changes, f"pretrain.steps={steps}", f"pretrain.validate_every={steps}"])
    section = config.pretrain
    model = build_decoder(section.model, config.seed)
    train = TokenStore(paths.TOKENS, ["train"])
    stream = SampleStream(training_samples(train, model.vocabulary, section, config.seed), len(train), section.batch_size, config.seed)
    start = time.perf_counter()
    state = setup(model, section)
    fit(state, stream, section, {}, "pretrain")
    rate = steps / (time.perf_counter() - start)
    image_metrics = validate(state, held_out_batches(model, config, ObjectiveConfig(mean_masks=0, segment_rate=0)), section)
    caption = ObjectiveConfig(mean_masks=0, segment_rate=1, caption_share=1)
    caption_metrics = validate(state, held_out_batches(model, config, caption), section)
    model.eval()
    per_image = image_metrics["loss_image"] * model.vocabulary.tokens_per_image
    losses = f"{rate:.2f} | {per_image:.2f} | {caption_metrics['loss_text']:.3f}"
    return f"| {' '.join(changes) or 'params.yaml'} | {losses} | {measured(model)} |"


def measured(model: Decoder) -> str:
    """The columns of the table that need no losses."""
    shown = ", ".join(f"{key}: {value:.3f}" for key, value in composition_by_objects(model).items())
    return f"{shown} | {binding(model):.2f} | {relations(model)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", default=[""])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--decoder", type=Path)
    options = parser.parse_args()
    own = "composition of one image | binding | relations"
    if options.decoder:
        print(f"| {own} |\n|---|---|---|\n| {measured(Decoder.load(options.decoder))} |")
    else:
        print(f"| changes | steps/s | nats per image | nats per caption token | {own} |\n|---|---|---|---|---|---|---|")
        for variant in options.variants:
            print(trial(variant.split(), options.steps), flush=True)
