"""Short pretraining runs with different parameters, on the tokens of the last pipeline run:

    python benchmarks/decoder.py --steps 600 "pretrain.optimizer=adamw pretrain.learning_rate=0.003" "pretrain.learning_rate=0.01"

Each argument is one variant: changes to ``params.yaml``, separated by spaces. The table has for each variant

- steps a second;
- losses on the val split: nats an image given its caption, and nats a caption token given the image;
- composition accuracy of one plainly sampled image of each val prompt: of all prompts, and of those with 1, 2 and 3 different objects;
- "relation": how often a stated relation holds if count and colors are right (chance: about 0.25);
- "binding": how often an image of two objects is more likely given its caption than given the caption with the two colors swapped
  (chance: 0.5).

Shapes: N prompts, S codes of an image.
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
from cm3leon.data.batches import Batch, SortedStream
from cm3leon.data.manifest import read_manifest
from cm3leon.data.tokens import TokenStore
from cm3leon.generation.engine import generate_images, log_likelihoods
from cm3leon.generation.prompts import image_prompt
from cm3leon.generation.sampling import Sampler
from cm3leon.models.decoder import Decoder
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.scenes import composition
from cm3leon.scenes.scene import COLORS, SHAPES
from cm3leon.sequence.grammar import Prompt
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.training.pretraining import build_decoder, training_samples
from cm3leon.training.trainer import fit, setup, validate
from cm3leon.utils.images import to_pil

BATCH = 128
"""Prompts whose images are generated in one call."""
VALIDATION_BATCH = 64


def held_out_batches(model: Decoder, config: Config, objective: ObjectiveConfig) -> list[Batch]:
    """The val split once, without retrieved documents, masked by ``objective``."""
    section = config.pretrain.model_copy(update={"objective": objective, "retrieved_documents": [1.0]})
    store = TokenStore(paths.TOKENS, ["val"])
    samples = training_samples(store, model.vocabulary, section, config.seed)
    stream = SortedStream(samples, len(store), VALIDATION_BATCH, config.seed)
    return [stream(step) for step in range(max(1, len(store) // VALIDATION_BATCH))]


def composition_by_objects(model: Decoder) -> dict[str, float]:
    """Composition accuracy of one plainly sampled image of each val prompt: "all", by the number of different objects, and "relation"."""
    image_tokenizer, text_tokenizer = ImageTokenizer.load(paths.IMAGE_TOKENIZER), TextTokenizer.load(paths.TEXT_TOKENIZER)
    captions = [str(found[0]) for found in read_manifest(paths.VALIDATED, "val")["captions"]]
    vocabulary = model.vocabulary
    prompts = [[image_prompt([("text", vocabulary.text(text_tokenizer.encode(caption)))], [], vocabulary)] for caption in captions]
    plain = Sampler(DecodingConfig(temperature=1.0, top_p=1.0, guidance=1.0))
    verdicts = []
    for start in range(0, len(prompts), BATCH):
        batch = slice(start, start + BATCH)
        seeds = [[row] for row in range(start, start + len(prompts[batch]))]
        codes_NS = generate_images(model, prompts[batch], seeds, plain)[:, 0]
        verdicts += composition.verdicts(captions[batch], to_pil(image_tokenizer.decode(torch.from_numpy(codes_NS))))
    correct = defaultdict(list)
    for caption, verdict in zip(captions, verdicts, strict=True):
        if verdict is not None and (statement := composition.parse_caption(caption)) is not None:
            for key in ("all", str(len(set(statement.objects)))):
                correct[key].append(all(verdict.values()))
            if "relation" in verdict and verdict["count"] and verdict["color"]:
                correct["relation"].append(verdict["relation"])
    return {key: float(np.mean(values)) for key, values in sorted(correct.items())}


def swapped_colors(caption: str) -> str | None:
    """A caption of two objects of different colors and shapes, with the colors swapped; None for all other captions."""
    object_ = rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b"
    found = re.findall(object_, caption)
    if len(found) != 2 or len({color for color, _ in found}) < 2 or len({shape for _, shape in found}) < 2:
        return None
    other = {found[0][0]: found[1][0], found[1][0]: found[0][0]}
    return re.sub(object_, lambda match: f"{other[match[1]]} {match[2]}", caption)


def binding(model: Decoder) -> float:
    """Share of val images of two objects that are more likely given their caption than given the caption with the colors swapped."""
    tokenizer, store, vocabulary = TextTokenizer.load(paths.TEXT_TOKENIZER), TokenStore(paths.TOKENS, ["val"]), model.vocabulary
    images, captions, swapped = [], [], []
    for row in read_manifest(paths.VALIDATED, "val").itertuples():
        caption = str(row.captions[0])
        if (other := swapped_colors(caption)) is not None:
            images.append(Prompt(vocabulary.image(store.by_id(row.id).codes), np.arange(1, vocabulary.tokens_per_image + 1)))
            captions.append(caption)
            swapped.append(other)

    def likelihoods(texts: Sequence[str]) -> np.ndarray:
        """Log-likelihood (N,) of each image given its text."""
        prompts = [image_prompt([("text", vocabulary.text(tokenizer.encode(text)))], [], vocabulary) for text in texts]
        return np.array([float(logs_S.sum()) for logs_S in log_likelihoods(model, prompts, images)])

    return float(np.mean(likelihoods(captions) > likelihoods(swapped)))


def trial(changes: Sequence[str], steps: int) -> str:
    """Train one variant; returns its row of the table."""
    # 1. Train.
    config = changed_config([*changes, f"pretrain.steps={steps}", f"pretrain.validate_every={steps}"], PARAMS)
    section = config.pretrain
    model = build_decoder(section.model, config.seed)
    train = TokenStore(paths.TOKENS, ["train"])
    stream = SortedStream(training_samples(train, model.vocabulary, section, config.seed), len(train), section.batch_size, config.seed)
    start = time.perf_counter()
    state = setup(model, section)
    fit(state, stream, section, {}, "pretrain")
    rate = steps / (time.perf_counter() - start)
    # 2. Losses: images after their captions (nothing is masked), and captions after their images (every caption is masked).
    no_masks = ObjectiveConfig(mean_masks=0, segment_rate=0)
    caption_masked = ObjectiveConfig(mean_masks=0, segment_rate=1, caption_share=1)
    image_loss = validate(state, held_out_batches(model, config, no_masks), section)["loss_image"]
    caption_loss = validate(state, held_out_batches(model, config, caption_masked), section)["loss_text"]
    # 3. Generated images.
    model.eval()
    accuracy = ", ".join(f"{key}: {share:.3f}" for key, share in composition_by_objects(model).items())
    losses = f"{image_loss * model.vocabulary.tokens_per_image:.2f} | {caption_loss:.3f}"
    return f"| {' '.join(changes) or 'params.yaml'} | {rate:.2f} | {losses} | {accuracy} | {binding(model):.2f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", default=[""])
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    print("| changes | steps/s | nats an image | nats a caption token | composition of one image | binding |\n|---|---|---|---|---|---|")
    for variant in options.variants:
        print(trial(variant.split(), options.steps), flush=True)
