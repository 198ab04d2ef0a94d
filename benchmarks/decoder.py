"""Compare settings of pretraining by short runs on the tokens of the last pipeline run:

    python benchmarks/decoder.py --steps 600 "pretrain.optimizer=adamw pretrain.learning_rate=0.003" "pretrain.learning_rate=0.01"

Each argument is one variant: changes to ``params.yaml``, separated by spaces. The table has a row for each, measured on the val split:

- steps per second of training;
- losses without masks: nats per image given its caption, and nats per caption token given the image;
- composition accuracy of one unranked image for each prompt, also by the number of different objects that the prompt names, and
  "relation": how often a stated relation holds if number and colors are right (chance: about 0.25);
- "binding": how often an image of two objects is more likely given its caption than given it with swapped colors (chance: 0.5).
"""

from __future__ import annotations

import argparse
import re
import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from cm3leon.config import paths
from cm3leon.config.profiles import PARAMS, changed_config
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
from cm3leon.scenes.scene import COLORS, SHAPES
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


def binding(model: Decoder) -> float:
    """Fraction of val images of two objects that are more likely given their caption than given it with the colors swapped."""
    texts = TextTokenizer.load(paths.TEXT_TOKENIZER)
    store = TokenStore(paths.TOKENS, ["val"])
    vocabulary = model.vocabulary
    rows = read_manifest(paths.VALIDATED, "val")
    asked = [(store.by_id(name).codes, str(captions[0])) for name, captions in zip(rows["id"], rows["captions"], strict=True)]
    pairs = [(codes, caption, other) for codes, caption in asked if (other := swapped_colors(caption)) is not None]
    if not pairs:
        return float("nan")
    images = [Prompt(vocabulary.image(codes), np.arange(1, vocabulary.tokens_per_image + 1)) for codes, _, _ in pairs]
    found = []
    for which in (1, 2):
        prompts = [image_prompt([("text", vocabulary.text(texts.encode(str(pair[which]))))], [], vocabulary) for pair in pairs]
        found.append([float(scores.sum()) for scores in log_likelihoods(model, prompts, images)])
    return float(np.mean(np.array(found[0]) > np.array(found[1])))


def trial(changes: Sequence[str], steps: int) -> str:
    """Train one variant and return its row of the table."""
    config = changed_config([*changes, f"pretrain.steps={steps}", f"pretrain.validate_every={steps}"], PARAMS)
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
    shown = ", ".join(f"{key}: {value:.3f}" for key, value in composition_by_objects(model).items())
    per_image = image_metrics["loss_image"] * model.vocabulary.tokens_per_image
    columns = f"{rate:.2f} | {per_image:.2f} | {caption_metrics['loss_text']:.3f} | {shown} | {binding(model):.2f}"
    return f"| {' '.join(changes) or 'params.yaml'} | {columns} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", default=[""])
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    print("| changes | steps/s | nats per image | nats per caption token | composition of one image | binding |\n|---|---|---|---|---|---|")
    for variant in options.variants:
        print(trial(variant.split(), options.steps), flush=True)
