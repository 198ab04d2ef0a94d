"""The registered model's code: MLflow runs this file to load and serve a bundle (``mlflow models serve``, ``mlflow.pyfunc.load_model``).

A request is a table or a list of rows. ``task`` is by default ``text_to_image``; the other columns are the fields of the task's request
(:mod:`cm3leon.serving.requests`): ``{"prompt": ...}``, ``{"task": "vqa", "image": ..., "question": ...}``,
``{"task": "edit", "image": ..., "instruction": ...}`` and so on. ``image`` is a base64 PNG or JPEG, with or without a ``data:`` prefix, or
the path of a file below a directory that ``CM3LEON_IMAGES`` names; ``box``, ``objects``, ``document`` and ``options`` are JSON, or lists.
Answers are rows in the order of the request; ``row`` is the number of the row answered, which may have several:

    {"dataframe_records": [{"prompt": "a red circle"}, {"task": "infill", "image": "iVBO...", "box": "[0, 0, 32, 32]", "prompt": "a ring"}],
     "params": {"seed": 1, "num_images": 2}}
"""

from __future__ import annotations

import base64
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel
from PIL import Image
from pydantic import ValidationError

from cm3leon.generation.task_names import FORMER_NAMES
from cm3leon.registry.signature import JSON_COLUMNS, OUTPUTS, REQUEST_COLUMNS, RequestSettings, request_settings
from cm3leon.serving.calls import Call, perform
from cm3leon.serving.errors import ApiError, from_validation
from cm3leon.serving.requests import REQUESTS
from cm3leon.serving.responses import png
from cm3leon.serving.schemas import ImageRequest, TextRequest
from cm3leon.utils.errors import UserError
from cm3leon.utils.texts import is_blank

if TYPE_CHECKING:
    from cm3leon.generation.generator import Generator


IMAGES_ENV = "CM3LEON_IMAGES"
"""Directories whose files may be named in requests, separated as in PATH; unset: none."""
LONGEST_PATH = 1024
"""Characters; a longer value is an image itself."""


class BundleModel(PythonModel):
    """A bundle with MLflow's interface. The bundle is loaded at the first request."""

    def __init__(self) -> None:
        self._generator: Generator | None = None

    def generator(self, context: Any) -> Generator:
        """The generator of the context's bundle, loaded once."""
        if self._generator is None:
            from cm3leon.generation.generator import Generator

            self._generator = Generator.from_bundle(context.artifacts["bundle"])
        return self._generator

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answer every row; rows that differ only in their texts and images are answered together.

        Raises:
            ValueError: naming the row or the parameter that is wrong and what is allowed.
        """
        settings = request_settings(params)
        generator = self.generator(context)
        # 1. Each row as a call; rows with equal keys are one call.
        calls = [call_of(number, record, settings, generator) for number, record in enumerate(records_of(model_input))]
        groups: dict[Any, list[int]] = {}
        for number, call in enumerate(calls):
            groups.setdefault(call.key, []).append(number)
        # 2. Their answers, in the order of the rows.
        answers: list[dict[str, Any]] = []
        for numbers in groups.values():
            for number, result in zip(numbers, results_of(numbers, calls, generator), strict=True):
                answers += [{"row": number, "task": calls[number].task, **answer} for answer in answers_of(result)]
        answers.sort(key=lambda answer: answer["row"])
        return pd.DataFrame(answers, columns=list(OUTPUTS))


def records_of(model_input: Any) -> list[Any]:
    """The request's rows."""
    if isinstance(model_input, pd.DataFrame):
        return model_input.to_dict("records")
    return [dict(model_input)] if isinstance(model_input, Mapping) else list(model_input)


def call_of(number: int, record: Any, settings: RequestSettings, generator: Generator) -> Call:
    """The generator's call for row ``number``.

    Raises:
        ValueError: naming the row and what is wrong with it.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"row {number}: expected a mapping with {', '.join(REQUEST_COLUMNS)}, found {type(record).__name__}")
    if unknown := sorted(map(str, set(record) - set(REQUEST_COLUMNS))):
        raise ValueError(f"row {number}: unknown column {unknown[0]!r}; known are {', '.join(REQUEST_COLUMNS)}")
    # Lists of a parquet file are arrays in pandas.
    cells = {str(name): value.tolist() if isinstance(value, np.ndarray) else value for name, value in record.items()}
    row = {name: value for name, value in cells.items() if is_given(number, name, value)}
    task = row.pop("task", "text_to_image")
    if task in FORMER_NAMES:
        warnings.warn(f"row {number}: the task {task} is now called {FORMER_NAMES[task]}", stacklevel=2)
        task = FORMER_NAMES[task]
    if task not in REQUESTS:
        raise ValueError(f"row {number}: unknown task {task!r}; known are {', '.join(REQUESTS)}")
    try:
        fields = {name: json.loads(value) if name in JSON_COLUMNS and isinstance(value, str) else value for name, value in row.items()}
    except ValueError as error:
        raise ValueError(f"row {number}: {' and '.join(JSON_COLUMNS)} must be JSON ({error})") from None
    if "image" in fields:
        fields["image"] = image_of(number, fields["image"])
    request = REQUESTS[task]
    # MLflow fills in the signature's defaults. They count as left out, so that a task's own defaults and the limit of candidates hold.
    defaults = generator.decoding.model_dump()
    given = {name: value for name, value in settings.model_dump(exclude_none=True).items() if value != defaults.get(name)}
    if issubclass(request, ImageRequest):
        given["n"] = settings.num_images
    if issubclass(request, TextRequest):
        given["temperature"] = settings.text_temperature
    used = {name: value for name, value in given.items() if name in request.model_fields}
    try:
        return request.model_validate(used | fields).call(generator)
    except ValidationError as error:
        raise ValueError(f"row {number}: task {task}: {from_validation(error.errors()).message}") from None
    except ApiError as error:
        raise ValueError(f"row {number}: {error.message}") from None


def is_given(number: int, name: str, value: Any) -> bool:
    """Whether a cell of row ``number`` holds something: a text that is not blank or, in a column of JSON, what such a text would stand for.

    Raises:
        ValueError: for a cell that holds something else.
    """
    if isinstance(value, str):
        return not is_blank(value)
    if name in JSON_COLUMNS and isinstance(value, list | dict):
        return True
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return False
    allowed = "JSON or a list" if name in JSON_COLUMNS else "text, which of an image is its file in base64"
    raise ValueError(f"row {number}: {name}: must be {allowed}, found {type(value).__name__}")


def image_of(number: int, value: str) -> str:
    """The image of a row as base64; the row holds that, or the path of a file that may be opened.

    A served model would otherwise open any file of its host for whoever may ask it something: paths are opened only below the directories
    that :data:`IMAGES_ENV` names.

    Raises:
        ValueError: for a path that may not be opened.
    """
    if len(value) >= LONGEST_PATH or not Path(value).suffix:  # base64 has no period
        return value
    roots = [Path(root).resolve() for root in os.environ.get(IMAGES_ENV, "").split(os.pathsep) if root]
    path = Path(value).resolve()
    if not any(path.is_relative_to(root) for root in roots):
        where = f"below {os.pathsep.join(map(str, roots))}" if roots else "nowhere"
        raise ValueError(f"row {number}: paths are opened {where}; name directories in {IMAGES_ENV}, or send the image as base64")
    try:
        return base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise ValueError(f"row {number}: {value} cannot be read: {error.strerror}") from None


def results_of(numbers: Sequence[int], calls: Sequence[Call], generator: Generator) -> list[Any]:
    """The generator's results for rows whose calls have equal keys.

    Raises:
        ValueError: naming the first row that cannot be answered, and why.
    """
    try:
        return perform(generator, [calls[number] for number in numbers])
    except UserError as error:
        if len(numbers) == 1:
            raise ValueError(f"row {numbers[0]}: {error}") from None
    return [result for number in numbers for result in results_of([number], calls, generator)]


def answers_of(result: Any) -> Iterator[dict[str, Any]]:
    """The generator's result for one row as rows of the answer."""
    from cm3leon.generation.results import GeneratedImage, GeneratedText, PairScore

    if isinstance(result, PairScore):
        yield {"text_log_likelihood": result.text, "image_log_likelihood": result.image}
        return
    for part in result if isinstance(result, list) else [result]:
        if isinstance(part, GeneratedImage):
            documents = json.dumps(part.retrieved_documents, allow_nan=False)
            yield {"image_png": png(part), "score": part.score, "seed": part.seed, "retrieved_documents": documents}
        elif isinstance(part, GeneratedText):
            yield {"text": part.text, "seed": part.seed}
        else:
            yield {"image_png": png(part)} if isinstance(part, Image.Image) else {"text": part}


mlflow.models.set_model(BundleModel())
