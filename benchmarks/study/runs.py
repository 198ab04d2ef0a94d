"""Decoders trained for the study, and results that are kept, so that nothing is computed twice."""

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
from cm3leon.generation.generator import Generator
from cm3leon.scenes import composition
from cm3leon.stages.evaluate import load
from cm3leon.tracking.lineage import content_hash
from cm3leon.training.pretraining import build_decoder, training_samples, validation_batches
from cm3leon.training.trainer import fit, setup

ROOT = Path("models/study")
VALIDATIONS = 16
"""Points of a learning curve."""
COUNTED = 64
"""Batches from which the tokens of a step are estimated."""


@dataclass(frozen=True)
class Study:
    """What all parts share: parameters, the tokens that each decoder is trained on, the number of prompts and of seeds."""

    config: Config
    tokens: int
    prompts: int
    seeds: int

    @cached_property
    def captions(self) -> list[str]:
        """Prompts of the val split that state a scene."""
        found = [str(texts[0]) for texts in read_manifest(paths.VALIDATED, "val")["captions"]]
        return [caption for caption in found if composition.parse_caption(caption) is not None][: self.prompts]

    @cached_property
    def inputs(self) -> str:
        """A hash of what the study reads."""
        read = (paths.TOKENS, paths.NEIGHBORS, paths.IMAGE_TOKENIZER, paths.TEXT_TOKENIZER, paths.ENCODER, paths.INDEX)
        return digest([content_hash(path) for path in read])

    def kept(self, name: str, key: Any, compute: Callable[[], Any]) -> Any:
        """The result ``name`` as it was computed before for the same ``key`` and inputs, or computed now and kept as JSON."""
        file = ROOT / "results" / f"{name}-{digest([key, self.inputs, self.prompts])}.json"
        if not file.is_file():
            value = compute()
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(value))
            partial.rename(file)
        return json.loads(file.read_text())

    def trained(self, name: str, changes: Sequence[str], seed: int) -> tuple[Path, dict[str, Any]]:
        """A decoder pretrained from nothing on ``tokens`` tokens with changed parameters, and its learning curve."""
        directory = (
            ROOT / f"{name}-{seed}-{digest([list(changes), self.tokens, self.inputs, self.config.pretrain.model_dump(mode='json')])}"
        )

        def train() -> dict[str, Any]:
            print(f"training {directory.name}", flush=True)
            return self._train(directory, changes, seed)

        return directory, self.kept(directory.name, "curve", train)

    def _train(self, directory: Path, changes: Sequence[str], seed: int) -> dict[str, Any]:
        config = changed_config([*changes, f"seed={seed}"], PARAMS)
        section = config.pretrain
        model = build_decoder(section.model, seed)
        train, held_out = TokenStore(paths.TOKENS, ["train"]), TokenStore(paths.TOKENS, ["val"])
        samples = training_samples(train, model.vocabulary, section, seed)
        stream = SortedStream(samples, len(train), section.batch_size, seed)
        a_step = float(np.mean([int((stream(step).tokens > 0).sum()) for step in range(COUNTED)]))
        steps = max(VALIDATIONS, round(self.tokens / a_step))
        section = section.model_copy(update={"steps": steps, "validate_every": max(1, steps // VALIDATIONS)})
        with_documents = section.model_copy(update={"retrieved_documents": [0.0, 0.0, 1.0]})  # all are judged on none and on two
        validation = validation_batches(replace(samples, store=held_out, retrieved_shares=[1.0]), with_documents)
        curve: list[dict[str, float]] = []
        fit(
            setup(model, section),
            SortedStream(samples, len(train), section.batch_size, seed),
            section,
            validation,
            directory.name,
            lambda figures, step: curve.append({"tokens": step * a_step, **figures}) if "val_loss" in figures else None,
        )
        model.save(directory)
        return {"parameters": model.parameter_count, "steps": steps, "curve": curve}

    def generator(self, model: Path) -> Generator:
        """A generator on a decoder of the study, or of the pipeline, with the pipeline's other parts and plain sampling."""
        plain = DecodingConfig(temperature=1.0, top_p=1.0, guidance=1.0, candidates=1, likelihood=0.0, tasks={})
        return load(self.config.model_copy(update={"decoding": plain}), model)

    def composition(self, model: Path, number: int = 1, **settings: Any) -> dict[str, Any]:
        """Composition accuracy of ``number`` unranked images of each prompt, with its interval over prompts."""
        scores = self.kept(
            "composition", [str(model), content_hash(model), number, settings], lambda: self._scores(model, number, settings)
        )
        values = np.array(scores)
        return {"mean": float(values.mean()), "interval": bootstrap(values.mean(1), 1000, 0)}

    def _scores(self, model: Path, number: int, settings: dict[str, Any]) -> list[list[float]]:
        drawn = self.generator(model).text_to_image(self.captions, number, **settings)
        return [
            [
                float(all(verdict.values()))
                for verdict in composition.verdicts([caption] * number, [image.image for image in images])
                if verdict
            ]
            for caption, images in zip(self.captions, drawn, strict=True)
        ]
