"""Two models, the same prompts and seeds, next to each other on one HTML page with their scores."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cm3leon.evaluation.alignment import clip_score
from cm3leon.generation.generator import Generator
from cm3leon.generation.results import GeneratedImage
from cm3leon.scenes import composition
from cm3leon.utils.errors import UserError
from cm3leon.utils.html import image_tag, page

SIDE = 256
"""Width at which images are shown, pixels."""


class Compared(NamedTuple):
    """One model's images, and what is measured of each.

    Attributes:
        images: best of its candidates, one a prompt.
        clip_scores: by the second model's encoder, for both models.
        right: every attribute that the prompt states is right; None if the prompt describes no scene.
    """

    images: list[GeneratedImage]
    clip_scores: list[float]
    right: list[bool | None]


def read_prompts(file: Path) -> list[str]:
    """The prompts of a text file, one a line; blank lines do not count.

    Raises:
        UserError: if there are none, or the file is not UTF-8.
    """
    try:
        prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error}") from None
    if not prompts:
        raise UserError(f"{file} has no prompts; write one a line")
    return prompts


def compare_models(models: Sequence[tuple[str, Path]], prompts: Sequence[str], seed: int) -> tuple[str, list[Compared]]:
    """Generate an image a prompt with each of two models, with their own settings; returns the page and what is on it.

    Args:
        models: name and bundle directory of each; one is in memory at a time.
        seed: of the first candidate of every prompt, the same for both models.
    """
    *others, (_, last) = models
    generated = [_best_images(Generator.from_bundle(bundle), prompts, seed) for _, bundle in others]
    generator = Generator.from_bundle(last)
    generated.append(_best_images(generator, prompts, seed))
    encoder = generator.encoder
    assert encoder is not None  # a bundle has one
    found = []
    for images in generated:
        pictures = [image.image for image in images]
        outcomes = composition.check_images(prompts, pictures)
        right = [None if outcome is None else all(outcome.values()) for outcome in outcomes]
        found.append(Compared(images, clip_score(encoder, pictures, prompts).tolist(), right))
    return _page([name for name, _ in models], prompts, seed, found), found


def _best_images(generator: Generator, prompts: Sequence[str], seed: int) -> list[GeneratedImage]:
    return [images[0] for images in generator.text_to_image([generator.shorten(text) for text in prompts], seed=seed)]


def summary(name: str, compared: Compared) -> str:
    """A model's mean scores in a line."""
    known = [outcome for outcome in compared.right if outcome is not None]
    parts = [f"CLIP score {sum(compared.clip_scores) / len(compared.clip_scores):.4f}"]
    if known:
        parts.append(f"composition {sum(known)} of {len(known)} right")
    return f"{name}: {', '.join(parts)}"


def _page(names: Sequence[str], prompts: Sequence[str], seed: int, found: Sequence[Compared]) -> str:
    rows = []
    for number, prompt in enumerate(prompts):
        cells = "".join(f"<td>{_cell(compared, number)}</td>" for compared in found)
        rows.append(f"<tr><td>{html.escape(prompt)}</td>{cells}</tr>")
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = "".join(f"<li>{html.escape(summary(name, compared))}</li>" for name, compared in zip(names, found, strict=True))
    body = (
        f"<h1>{html.escape(' and '.join(names))}</h1><p>{len(prompts)} prompts, seed {seed}. Each model uses its own settings of decoding"
        f" and retrieval; CLIP scores are by the encoder of {html.escape(names[-1])}.</p><ul>{lines}</ul>"
        f"<table><tr><th>prompt</th>{heads}</tr>{''.join(rows)}</table>"
    )
    return page(" and ".join(names), body)


def _cell(compared: Compared, number: int) -> str:
    png = io.BytesIO()
    compared.images[number].save(png)
    right = {True: ", right", False: ", wrong", None: ""}[compared.right[number]]
    shown = image_tag(png.getvalue(), compared.images[number].prompt).replace("<img", f'<img width="{SIDE}"', 1)
    return f"{shown}<br>CLIP {compared.clip_scores[number]:.3f}{right}"
