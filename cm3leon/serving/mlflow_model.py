"""The registered model's code: MLflow runs this file to load and serve a bundle (``mlflow models serve``, ``mlflow.pyfunc.load_model``).

A request is a table or a list of rows. ``task`` is ``text_to_image`` (the default; ``prompt``), ``caption`` (``image``) or ``vqa``
(``image`` and ``question``); ``image`` is a base64 PNG or JPEG, with or without a ``data:`` prefix, or the path of a file that the
server may read. Answers are rows in the order of the request, ``row`` naming the row answered:

    {"dataframe_records": [{"prompt": "a red circle"}, {"task": "vqa", "image": "iVBO...", "question": "how many circles?"}],
     "params": {"seed": 1, "num_images": 2}}
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
from PIL import Image

from cm3leon.serving.signature import COLUMNS, TASKS, RequestSettings, request_settings

if TYPE_CHECKING:
    from cm3leon.generation.generator import Generator

MAX_PIXELS = 50_000_000


class BundleModel(mlflow.pyfunc.PythonModel):
    """A bundle behind MLflow's interface. The bundle is read at the first request."""

    def __init__(self) -> None:
        self._generator: Generator | None = None

    def generator(self, context: Any) -> Generator:
        """The generator of the context's bundle, loaded once."""
        if self._generator is None:
            from cm3leon.generation.generator import Generator

            self._generator = Generator.from_bundle(context.artifacts["bundle"])
        return self._generator

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answer every row.

        Raises:
            ValueError: naming the row or the parameter that is wrong and what is allowed.
        """
        settings = request_settings(params)
        rows = read_rows(model_input)
        answers: list[dict[str, Any]] = []
        for task in TASKS:
            part = [(number, row) for number, row in enumerate(rows) if row["task"] == task]
            if part:
                answers += getattr(self, f"_{task}")(self.generator(context), part, settings)
        answers.sort(key=lambda answer: answer["row"])
        return pd.DataFrame(answers, columns=["row", "task", "text", "image_png", "score", "seed", "neighbours"])

    def _text_to_image(self, generator: Generator, rows: list[tuple[int, Any]], settings: RequestSettings) -> list[dict[str, Any]]:
        drawn = generator.text_to_image([row["prompt"] for _, row in rows], **settings.model_dump())
        return [
            {
                "row": number,
                "task": "text_to_image",
                "image_png": png(image),
                "score": image.score,
                "seed": image.seed,
                "neighbours": json.dumps(image.neighbours),
            }
            for (number, _), images in zip(rows, drawn, strict=True)
            for image in images
        ]

    def _caption(self, generator: Generator, rows: list[tuple[int, Any]], settings: RequestSettings) -> list[dict[str, Any]]:
        texts = generator.caption([read_image(number, row["image"]) for number, row in rows])
        return [{"row": number, "task": "caption", "text": text.text} for (number, _), text in zip(rows, texts, strict=True)]

    def _vqa(self, generator: Generator, rows: list[tuple[int, Any]], settings: RequestSettings) -> list[dict[str, Any]]:
        images = [read_image(number, row["image"]) for number, row in rows]
        texts = generator.answer(images, [row["question"] for _, row in rows])
        return [{"row": number, "task": "vqa", "text": text.text} for (number, _), text in zip(rows, texts, strict=True)]


NEEDED = {"text_to_image": ("prompt",), "caption": ("image",), "vqa": ("image", "question")}


def read_rows(model_input: Any) -> list[dict[str, str]]:
    """The request's rows with their task filled in; every column a task needs is a non-empty string."""
    if isinstance(model_input, pd.DataFrame):
        records = model_input.to_dict("records")
    elif isinstance(model_input, Mapping):
        records = [dict(model_input)]
    else:
        records = list(model_input)
    rows: list[dict[str, str]] = []
    for number, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise ValueError(f"row {number}: expected a mapping with {', '.join(COLUMNS)}, found {type(record).__name__}")
        if unknown := sorted(map(str, set(record) - set(COLUMNS))):
            raise ValueError(f"row {number}: unknown column {unknown[0]!r}; known are {', '.join(COLUMNS)}")
        row = {str(name): value for name, value in record.items() if isinstance(value, str) and value.strip()}
        task = row.setdefault("task", TASKS[0])
        if task not in TASKS:
            raise ValueError(f"row {number}: unknown task {task!r}; known are {', '.join(TASKS)}")
        if lacking := [name for name in NEEDED[task] if name not in row]:
            raise ValueError(f"row {number}: task {task} needs {' and '.join(lacking)}, as text that is not empty")
        rows.append(row)
    return rows


def read_image(number: int, value: str) -> Image.Image:
    """The image of row ``number``: base64, or the path of a file."""
    try:
        if len(value) < 1024 and Path(value).is_file():
            image = Image.open(value)
        else:
            image = Image.open(io.BytesIO(base64.b64decode(value.partition("base64,")[2] or value, validate=True)))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels, at most {MAX_PIXELS} are taken")
        return image.convert("RGB")
    except (OSError, ValueError, binascii.Error) as error:
        raise ValueError(f"row {number}: image is neither the path of an image nor a base64 PNG or JPEG ({error})") from None


def png(generated: Any) -> str:
    """A drawn image as base64 PNG, with prompt, settings and retrieved documents in its metadata."""
    stream = io.BytesIO()
    generated.save(stream)
    return base64.b64encode(stream.getvalue()).decode()


mlflow.models.set_model(BundleModel())
