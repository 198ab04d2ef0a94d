"""Decoders that are trained for the study, and a cache of results, so that nothing is computed twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.config import paths
from cm3leon.config.profiles import PARAMS, changed_config
from cm3leon.config.schema import Config, DecodingConfig
from cm3leon.data.batches import SortedStream
from cm3leon.data.manifest import read_manifest
from cm3leon.data.tokens import TokenStore
from cm3leon.evaluation.record import bootstrap, digest
from cm3leon.evaluation.run import load_generator
from cm3leon.generation.generator import Generator
from cm3leon.scenes import composition
from cm3leon.tracking.lineage import content_hash
from cm3leon.training.pretraining import build_decoder, training_samples, validation_batches
from cm3leon.training.trainer import fit, setup

ROOT = Path("models/study")
VALIDATIONS = 16
"""Points of a learning curve."""
COUNTED_BATCHES = 64
"""Batches from which the mean number of tokens in a step is estimated."""
RESAMPLES = 1000
"""Bootstrap resamples of an interval."""


@dataclass(frozen=True)
class Study:
    """Settings that all claims share.

    Attributes:
        tokens: tokens that each decoder is trained on.
        prompts: most prompts that a claim is measured on.
        seeds: runs of each variant, with the seeds 0, 1, ...
    """

    config: Config
    tokens: int
    prompts: int
    seeds: int

    @cached_property
    def captions(self) -> list[str]:
        """First captions of the val split that describe a scene: the prompts of the study."""
        found = [str(texts[0]) for texts in read_manifest(paths.VALIDATED, "val")["captions"]]
        return [caption for caption in found if composition.parse_caption(caption) is not None][: self.prompts]

    @cached_property
    def inputs(self) -> str:
        """Hash of everything the study reads from the pipeline's outputs."""
        read = (paths.TOKENS, paths.NEIGHBORS, paths.IMAGE_TOKENIZER, paths.TEXT_TOKENIZER, paths.ENCODER, paths.INDEX)
        return digest([content_hash(path) for path in read])

    def cached(self, name: str, key: Any, compute: Callable[[], Any]) -> Any:
        """The result ``name``, as JSON: cached for the same ``key``, inputs and number of prompts, or computed now."""
        file = ROOT / "results" / f"{name}-{digest([key, self.inputs, self.prompts])}.json"
        if not file.is_file():
            result = compute()
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")  # an interrupted write leaves no half result
            partial.write_text(json.dumps(result))
            partial.rename(file)
        return json.loads(file.read_text())

    def trained(self, name: str, changes: Sequence[str], seed: int) -> tuple[Path, dict[str, Any]]:
        """Pretrain a decoder from scratch on ``tokens`` tokens with changed parameters.

        Returns:
            Its directory; and its ``parameters``, ``steps`` and learning ``curve``: metrics at each validation, with ``tokens`` so far.
        """
        key = digest([list(changes), self.tokens, self.inputs, self.config.pretrain.model_dump(mode="json")])
        directory = ROOT / f"{name}-{seed}-{key}"

        def train() -> dict[str, Any]:
            print(f"training {directory.name}", flush=True)
            return self._train(directory, changes, seed)

        return directory, self.cached(directory.name, "curve", train)

    def _train(self, directory: Path, changes: Sequence[str], seed: int) -> dict[str, Any]:
        config = changed_config([*changes, f"seed={seed}"], PARAMS)
        section = config.pretrain
        model = build_decoder(section.model, seed)
        train, held_out = TokenStore(paths.TOKENS, ["train"]), TokenStore(paths.TOKENS, ["val"])
        samples = training_samples(train, model.vocabulary, section, seed)

        # 1. As many steps as the tokens are worth. Variants with retrieved documents have longer samples, so they take fewer steps:
        #    compute is equal, not the number of updates.
        stream = SortedStream(samples, len(train), section.batch_size, seed)
        tokens_per_step = float(np.mean([int((stream(step).tokens > 0).sum()) for step in range(COUNTED_BATCHES)]))
        steps = max(VALIDATIONS, round(self.tokens / tokens_per_step))
        section = section.model_copy(update={"steps": steps, "validate_every": max(1, steps // VALIDATIONS)})

        # 2. All variants are validated alike, without retrieved documents and with two, however they are trained.
        with_documents = section.model_copy(update={"retrieved_documents": [0.0, 0.0, 1.0]})
        validation = validation_batches(replace(samples, store=held_out, retrieved_shares=[1.0]), with_documents)

        # 3. Train, noting the validation losses.
        curve: list[dict[str, float]] = []

        def note(metrics: dict[str, float], step: int) -> None:
            if "val_loss" in metrics:
                curve.append({"tokens": step * tokens_per_step, **metrics})

        fit(
            setup(model, section), SortedStream(samples, len(train), section.batch_size, seed), section, validation, directory.name, note
        )  # fmt: skip
        model.save(directory)
        return {"parameters": model.parameter_count, "steps": steps, "curve": curve}

    def generator(self, model: Path) -> Generator:
        """A generator on a decoder of the study or of the pipeline: plain sampling, all other parts the pipeline's."""
        plain = DecodingConfig(temperature=1.0, top_p=1.0, guidance=1.0, candidates=1, likelihood=0.0, tasks={})
        return load_generator(self.config.model_copy(update={"decoding": plain}), model)

    def composition(self, model: Path, count: int = 1, **settings: Any) -> dict[str, Any]:
        """Composition accuracy of ``count`` unranked images of each prompt.

        Returns:
            Its ``mean`` and ``interval``, 95 % over prompts.
        """
        key = [str(model), content_hash(model), count, settings]
        correct = self.cached("composition", key, lambda: self._correct(model, count, settings))
        correct_PN = np.array(correct)  # prompts, images
        return {"mean": float(correct_PN.mean()), "interval": bootstrap(correct_PN.mean(1), RESAMPLES, 0)}

    def _correct(self, model: Path, count: int, settings: dict[str, Any]) -> list[list[float]]:
        """For each prompt and image 1 if every stated attribute is right, else 0."""
        correct = []
        for caption, images in zip(self.captions, self.generator(model).text_to_image(self.captions, count, **settings), strict=True):
            verdicts = composition.verdicts([caption] * count, [image.image for image in images])
            correct.append([float(all(verdict.values())) for verdict in verdicts if verdict])
        return correct
