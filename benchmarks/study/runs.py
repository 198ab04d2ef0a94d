"""The study's decoders and their scores; both are kept, so that nothing is computed twice."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from cm3leon.config import paths
from cm3leon.config.loading import load_config
from cm3leon.config.profiles import changed_config
from cm3leon.config.schema import Config, DecodingConfig
from cm3leon.data.batches import SampleStream
from cm3leon.data.manifest import read_manifest
from cm3leon.data.tokens import TokenStore
from cm3leon.evaluation.record import digest, wilson
from cm3leon.evaluation.run import load_generator
from cm3leon.generation.generator import Generator
from cm3leon.scenes import composition
from cm3leon.tracking.lineage import content_hash
from cm3leon.training.pretraining import build_decoder, training_samples, validation_batches
from cm3leon.training.trainer import fit, setup

ROOT = Path("models/study")
"""Where decoders and results are kept."""
VALIDATIONS = 16
"""Validations in a training run: the points of a learning curve."""
COUNTED = 64
"""Batches by which the mean number of tokens in a step is estimated."""


@dataclass(frozen=True)
class Study:
    """The settings of a study.

    Attributes:
        config: the project's parameters, which the claims change.
        tokens: training tokens of each decoder.
        prompts: prompts of the val split on which decoders are evaluated.
        seeds: training runs of each setting.
        runs: directories of finished pipeline runs, whose tuned decoders are measured.
    """

    config: Config
    tokens: int
    prompts: int
    seeds: int
    runs: tuple[Path, ...] = (Path(),)

    @cached_property
    def captions(self) -> list[str]:
        """Prompts of the val split that describe scenes."""
        found = [str(texts[0]) for texts in read_manifest(paths.VALIDATED, "val")["captions"]]
        return [caption for caption in found if composition.parse_caption(caption) is not None][: self.prompts]

    @cached_property
    def inputs(self) -> str:
        """A hash of all that the study reads."""
        read = (paths.TOKENS, paths.NEIGHBORS, paths.IMAGE_TOKENIZER, paths.TEXT_TOKENIZER, paths.ENCODER, paths.INDEX)
        return digest([content_hash(path) for path in read])

    @contextlib.contextmanager
    def at(self, run: Path) -> Iterator[Study]:
        """The study with the data, models and results of another pipeline run, in whose directory it works meanwhile."""
        with contextlib.chdir(run):
            yield replace(self, config=load_config())

    def kept(self, name: str, key: Any, compute: Callable[[], Any]) -> Any:
        """The result ``name`` for ``key``: read if it was computed before with the same inputs, else computed and kept as JSON.

        What another process computes just now is waited for.
        """
        file = ROOT / "results" / f"{name}-{digest([key, self.inputs, self.prompts])}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if not file.is_file():
                value = compute()
                partial = file.with_suffix(".partial")
                partial.write_text(json.dumps(value))
                partial.rename(file)  # atomic: an interrupted study leaves no half of a result
        return json.loads(file.read_text())

    def trained(self, name: str, changes: Sequence[str], seed: int) -> tuple[Path, dict[str, Any]]:
        """Pretrain a decoder from scratch with changed parameters, unless it was trained before.

        Returns:
            The decoder's directory; its number of parameters, its steps, and its learning curve (tokens and metrics of each validation).
        """
        directory = (
            ROOT / f"{name}-{seed}-{digest([list(changes), self.tokens, self.inputs, self.config.pretrain.model_dump(mode='json')])}"
        )

        def train() -> dict[str, Any]:
            print(f"training {directory.name}", flush=True)
            return self._train(directory, changes, seed)

        return directory, self.kept(directory.name, "curve", train)

    def _train(self, directory: Path, changes: Sequence[str], seed: int) -> dict[str, Any]:
        # 1. The decoder and its samples.
        config = changed_config([*changes, f"seed={seed}"])
        section = config.pretrain
        model = build_decoder(section.model, seed)
        train, held_out = TokenStore(paths.TOKENS, ["train"]), TokenStore(paths.TOKENS, ["val"])
        samples = training_samples(train, model.vocabulary, section, seed)
        stream = SampleStream(samples, len(train), section.batch_size, seed)

        # 2. As many steps as give the tokens of the study: settings are compared at equal compute, not at equal steps.
        tokens_per_step = float(np.mean([stream(step).tokens.numel() for step in range(COUNTED)]))
        steps = max(VALIDATIONS, round(self.tokens / tokens_per_step))
        section = section.model_copy(update={"steps": steps, "validate_every": max(1, steps // VALIDATIONS)})
        # Every decoder is validated without retrieved documents and with two, whatever it was trained on.
        with_documents = section.model_copy(update={"retrieved_documents": [0.0, 0.0, 1.0]})
        validation = validation_batches(replace(samples, store=held_out, retrieved_shares=[1.0]), with_documents)

        # 3. Training.
        curve: list[dict[str, float]] = []
        fit(
            setup(model, section),
            SampleStream(samples, len(train), section.batch_size, seed),
            section,
            validation,
            directory.name,
            lambda metrics, step: curve.append({"tokens": step * tokens_per_step, **metrics}) if "val_loss" in metrics else None,
        )
        model.save(directory)
        return {"parameters": model.parameter_count, "steps": steps, "curve": curve}

    def generator(self, model: Path) -> Generator:
        """A generator with a decoder of the study or of the pipeline, the pipeline's other models, and no guidance or ranking."""
        plain = DecodingConfig(temperature=1.0, top_p=1.0, guidance=1.0, candidates=1, likelihood=0.0, tasks={})
        return load_generator(self.config.model_copy(update={"decoding": plain}), model)

    def composition(self, model: Path, number: int = 1, **settings: Any) -> dict[str, Any]:
        """Composition accuracy, averaged over ``number`` unranked images of each prompt, with its interval over prompts."""
        scores = self.kept(
            "composition", [str(model), content_hash(model), number, settings], lambda: self._scores(model, number, settings)
        )
        values = np.array(scores)
        return {"mean": float(values.mean()), "interval": wilson(float(values.mean()), len(values))}

    def _scores(self, model: Path, number: int, settings: dict[str, Any]) -> list[list[float]]:
        """For each prompt and image whether every stated attribute is right, 0 or 1: (prompts, number)."""
        generated = self.generator(model).text_to_image(self.captions, number, **settings)
        return [
            list(composition.all_right(composition.check_images([caption] * number, [image.image for image in images])).values())
            for caption, images in zip(self.captions, generated, strict=True)
        ]
