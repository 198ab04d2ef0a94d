"""What a generator is made of: the parts of a bundle, loaded, and what each does on its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from PIL import Image

from cm3leon.config.schema import DecodingConfig, RetrieveConfig, current_name, current_names
from cm3leon.data.images import fit_square
from cm3leon.data.tokens import TokenStore
from cm3leon.generation.memory import Memory
from cm3leon.generation.prompts import answer_prompt, image_prompt
from cm3leon.generation.results import Neighbor
from cm3leon.models.decoder import Decoder
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.sequence.grammar import Tokens
from cm3leon.sequence.tasks import TASKS, Training
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.utils.device import default_device
from cm3leon.utils.errors import UserError
from cm3leon.utils.images import to_channels_first, to_pil

if TYPE_CHECKING:
    from cm3leon.models.clip import Encoder
    from cm3leon.models.super_resolution import SuperResolution

PICTURES = 64
"""Images encoded or decoded together."""

UNTOLD = frozenset(TASKS)
"""What a model may be asked that does not say what it was trained for."""


Precision = Literal["float32", "bfloat16", "int8"]


class BadInputError(UserError):
    """What was asked cannot be done; the message says what to change."""


def load_decoder(directory: Path, device: str, precision: Precision | None, compiled: bool = False) -> Decoder:
    """A decoder to generate with.

    Args:
        precision: ``int8`` holds the blocks' matrices as 8-bit integers, and the rest in bfloat16 on a GPU, float32 on a CPU; by default
            bfloat16 on a GPU and float32 on a CPU.
        compiled: run each step of decoding compiled. Compilation takes from seconds to minutes, once for each number of rows and length;
            on a GPU it pays for a server or for many images, on a CPU hardly.
    """
    model = Decoder.load(directory, device)
    model.compiled_decoding = compiled
    on_gpu = model.device.type != "cpu"
    if precision == "bfloat16" or (on_gpu and precision != "float32"):
        model = model.bfloat16()
    if precision == "int8":
        model.quantize()
    return model


class Parts:
    """All of a bundle's parts, loaded, and what they do on their own: encode, decode, retrieve, check settings and lengths."""

    def __init__(
        self,
        model: Decoder,
        image_tokenizer: ImageTokenizer,
        text_tokenizer: TextTokenizer,
        decoding: DecodingConfig,
        encoder: Encoder | None = None,
        memory: Memory | None = None,
        super_resolution: SuperResolution | None = None,
        training: Training | None = None,
    ) -> None:
        self.model, self.image_tokenizer, self.text_tokenizer, self.decoding = model, image_tokenizer, text_tokenizer, decoding
        self.encoder, self.memory, self.super_resolution, self.training = encoder, memory, super_resolution, training

    @classmethod
    def from_parts(
        cls,
        *,
        model: Path,
        image_tokenizer: Path,
        text_tokenizer: Path,
        decoding: DecodingConfig,
        encoder: Path | None = None,
        memory_bank: Path | None = None,
        tokens: Path | None = None,
        super_resolution: Path | None = None,
        retrieval: RetrieveConfig | None = None,
        device: str | None = None,
        precision: Precision | None = None,
        compiled: bool = False,
    ) -> Self:
        """Load from the directories of the stages.

        Without ``encoder`` there is no reranking; without it, ``memory_bank`` or ``tokens`` no retrieval; without ``super_resolution`` no
        upscaling. ``retrieval`` has the rules by which neighbors are taken; None: the package's. A decoder's directory may say what it
        was trained for (``training.json``); of one that does not, every task and guidance may be asked.

        Args:
            precision, compiled: see :func:`load_decoder`.
        """
        device = device or default_device()
        loaded_encoder, memory, upscaler = None, None, None
        if encoder is not None:
            from cm3leon.models.clip import Encoder

            loaded_encoder = Encoder.load(encoder).to(device)
        if loaded_encoder is not None and memory_bank is not None and tokens is not None:
            from cm3leon.retrieval.index import MemoryBank

            memory = Memory(MemoryBank.load(memory_bank), loaded_encoder, TokenStore(tokens), retrieval or RetrieveConfig())
        if super_resolution is not None:
            from cm3leon.models.super_resolution import SuperResolution

            upscaler = SuperResolution.load(super_resolution).to(device)
        return cls(
            load_decoder(model, device, precision, compiled),
            ImageTokenizer.load(image_tokenizer, device),
            TextTokenizer.load(text_tokenizer),
            decoding,
            loaded_encoder,
            memory,
            upscaler,
            Training.read(model),
        )

    @classmethod
    def from_bundle(cls, path: str | Path, device: str | None = None, precision: Precision | None = None, compiled: bool = False) -> Self:
        """Load a bundle directory; ``precision`` and ``compiled``: see :func:`load_decoder`.

        Raises:
            FileNotFoundError: if it is not one.
        """
        path = Path(path)
        if not (path / "decoding.json").is_file():
            raise FileNotFoundError(f"{path} is not a bundle: it has no decoding.json")
        upscaler, retrieval = path / "super_resolution", path / "retrieval.json"
        return cls.from_parts(
            model=path,
            image_tokenizer=path / "image_tokenizer",
            text_tokenizer=path / "text_tokenizer",
            decoding=DecodingConfig.model_validate(current_names(json.loads((path / "decoding.json").read_text()), "decoding")),
            encoder=path / "encoder",
            memory_bank=path / "memory_bank",
            tokens=path / "memory_bank" / "tokens",
            super_resolution=upscaler if upscaler.is_dir() else None,
            retrieval=RetrieveConfig.model_validate_json(retrieval.read_text()) if retrieval.is_file() else None,
            device=device,
            precision=precision,
            compiled=compiled,
        )

    @property
    def image_size(self) -> int:
        """Side of drawn images, pixels."""
        return self.image_tokenizer.spec.image_size

    @property
    def trained_tasks(self) -> frozenset[str]:
        """Tasks of instruction tuning that the model knows; of a model that does not say, all."""
        return self.training.tasks if self.training else UNTOLD

    # --- checks ----------------------------------------------------------------------------------------------------------

    def settings(self, changes: dict[str, Any]) -> DecodingConfig:
        """The decoding defaults with changes, of which None is none, checked.

        Raises:
            BadInputError: naming the setting and what is allowed.
        """
        from pydantic import ValidationError

        try:
            return DecodingConfig.model_validate({**self.decoding.model_dump(), **{k: v for k, v in changes.items() if v is not None}})
        except ValidationError as error:
            first = error.errors()[0]
            if new := current_name(f"decoding.{first['loc'][0]}"):
                raise BadInputError(f"{first['loc'][0]} is now called {new.removeprefix('decoding.')}") from None
            raise BadInputError(f"{first['loc'][0]}: {first['msg']} (found {first['input']!r})") from None

    def settings_of(self, task: str, changes: dict[str, Any]) -> DecodingConfig:
        """As :meth:`settings`, with the task's own defaults, for a task that the model must have been trained for, like the guidance asked
        for.

        Raises:
            BadInputError: if it was not.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        settings = self.settings({**self.decoding.tasks.get(task, {}), **given})
        if task not in self.trained_tasks:
            known = ", ".join(sorted(self.trained_tasks))
            raise BadInputError(f"this model was not tuned for {task} (it knows {known}); add it to sft.tasks and train again")
        guided = settings.guidance != 1 or settings.contrastive > 0 or (task == "edit" and settings.image_guidance != 1)
        if guided and self.training is not None and not self.training.masked_prompts:
            raise BadInputError(
                "guidance and contrastive decoding need a model that was trained on masked prompts (sft.conditioning_dropout or "
                "pretrain.objective.segment_rate above 0), and this one was not; use guidance 1 and contrastive 0"
            )
        return settings

    def check_same_length(self, one: str, values: Sequence[Any], other: str, others: Sequence[Any]) -> None:
        """Raises :class:`BadInputError` unless there is one of ``others`` for each of ``values``."""
        if len(values) != len(others):
            raise BadInputError(f"{len(values)} {one}s but {len(others)} {other}s; give one {other} for each {one}")

    def check_filled(self, what: str, texts: Sequence[str]) -> None:
        """Raises :class:`BadInputError` if one of ``texts`` is blank."""
        for number, text in enumerate(texts):
            if not text.strip():
                raise BadInputError(f"{what} {number} is empty")

    def check_inside(self, what: str, box: tuple[float, float, float, float], size: tuple[int, int]) -> None:
        """Raises :class:`BadInputError` unless a box (left, top, right, bottom) has an area and lies inside an image of ``size``."""
        x0, y0, x1, y1 = box
        if not (0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]):
            raise BadInputError(
                f"{what}, {tuple(box)}, must be left, top, right, bottom in pixels, inside the image of {size[0]} x {size[1]} and not empty"
            )

    # --- texts -----------------------------------------------------------------------------------------------------------

    def ids(self, text: str) -> Tokens:
        """Token ids of a text."""
        return self.model.vocabulary.text(self.text_tokenizer.encode(text))

    def shorten(self, prompt: str) -> str:
        """As much of a prompt's beginning as fits in the context with the image to draw; what fits already stays as it is."""
        vocabulary = self.model.vocabulary
        around = len(image_prompt([("text", self.ids("x"))], [], vocabulary, {0})) - 1 + vocabulary.tokens_per_image
        return self._cut(prompt, self.model.spec.context - around)

    def shorten_question(self, question: str) -> str:
        """As :meth:`shorten`, for a question about an image; leaves room for an answer of ``max_text_tokens``, or of half the rest."""
        template, blank = TASKS["vqa"].templates[0], np.zeros(self.model.vocabulary.tokens_per_image, dtype=np.int64)
        empty = answer_prompt(template, {"question": ""}, blank, self.model.vocabulary, self.text_tokenizer)
        room = self.model.spec.context - len(empty)
        return self._cut(question, room - min(self.decoding.max_text_tokens, room // 2))

    def _cut(self, text: str, room: int) -> str:
        cut, ids = text, self.text_tokenizer.encode(text)
        keep = max(1, room)
        while len(self.text_tokenizer.encode(cut)) > max(1, room) and keep > 0:  # a beginning read again can take more tokens than before
            cut = self.text_tokenizer.decode(ids[:keep]).rstrip("\ufffd ")  # the cut may fall inside a character
            keep -= 1
        return cut

    # --- images ----------------------------------------------------------------------------------------------------------

    def encode(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Codes (B, tokens_per_image) of images of any size; each is fitted to the tokenizer's square."""
        size = self.image_tokenizer.spec.image_size
        parts = []
        for start in range(0, len(images), PICTURES):
            pixels = np.stack([np.asarray(fit_square(image, size)) for image in images[start : start + PICTURES]])
            parts.append(self.image_tokenizer.encode(to_channels_first(torch.from_numpy(pixels), self.model.device)).cpu().numpy())
        return np.concatenate(parts)

    def decode(self, codes: np.ndarray) -> list[Image.Image]:
        """Images of codes (B, tokens_per_image)."""
        parts = torch.from_numpy(codes).split(PICTURES)
        return [image for part in parts for image in to_pil(self.image_tokenizer.decode(part.to(self.model.device)))]

    def upscale(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Images enlarged by the bundle's upscaler.

        Raises:
            BadInputError: if the generator has none.
        """
        if self.super_resolution is None:
            raise BadInputError("upscaling needs a bundle with super_resolution/")
        return self.super_resolution.upscale(images)

    # --- retrieval -------------------------------------------------------------------------------------------------------

    def neighbors(self, prompts: Sequence[str] | None, count: int, references: Sequence[Image.Image] | None = None) -> list[list[Neighbor]]:
        """Documents of the memory bank for each query, found by its text, its image or both, with licence, attribution and score.

        Raises:
            BadInputError: if documents are asked for and there is no memory bank, or nothing to find them by.
        """
        if prompts is None and references is None:
            raise BadInputError("documents are found by prompts, by images, or by both; give one of them")
        queries = prompts if prompts is not None else references
        if count == 0 or not queries:
            return [[] for _ in queries or []]
        if self.memory is None:
            raise BadInputError("retrieved_documents > 0 needs a bundle with an encoder and a memory bank")
        return self.memory.find(count, prompts, references)
