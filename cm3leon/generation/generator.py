"""The user's interface: a trained bundle that draws, captions and answers.

generator = Generator.from_bundle("models/bundle")
[[image]] = generator.text_to_image(["a red circle left of a blue square on a gray background"])
image.save("out.png")
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cm3leon.config import DecodingConfig, RetrieveConfig
from cm3leon.data.images import fit_square
from cm3leon.data.tokens import TokenStore
from cm3leon.documents import Tokens
from cm3leon.generation.engine import PromptTooLongError, generate_images, generate_texts, text_log_likelihoods
from cm3leon.model import Decoder
from cm3leon.progress import track
from cm3leon.tasks import TASKS, answer_prompt, image_prompt
from cm3leon.tokenizers.image import ImageTokenizer, to_float
from cm3leon.tokenizers.text import TextTokenizer

if TYPE_CHECKING:
    from cm3leon.retrieval.encoder import Encoder
    from cm3leon.retrieval.index import MemoryBank
    from cm3leon.super_resolution import SuperResolution

ROWS = 128
"""Sequences decoded together."""

PICTURES = 64
"""Images encoded or decoded together."""


class BadInputError(ValueError):
    """What was asked cannot be done; the message says what to change."""


@dataclass
class GeneratedImage:
    """An image and how it came about."""

    image: Image.Image
    prompt: str
    seed: int
    codes: np.ndarray
    score: float | None = None
    neighbours: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write a PNG whose metadata hold prompt, seed, settings and the retrieved documents' ids, licences and attributions."""
        info = PngInfo()
        record = {"prompt": self.prompt, "seed": self.seed, "score": self.score, "settings": self.settings, "neighbours": self.neighbours}
        info.add_itxt("cm3leon", json.dumps(record))
        self.image.save(path, format="PNG", pnginfo=info)


def image_of(pixels: torch.Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> PIL images."""
    arrays = pixels.add(1).mul(127.5).round().clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


class Generator:
    """All of a bundle's parts, ready to use."""

    def __init__(
        self,
        model: Decoder,
        image_tokenizer: ImageTokenizer,
        text_tokenizer: TextTokenizer,
        decoding: DecodingConfig,
        encoder: Encoder | None = None,
        memory_bank: MemoryBank | None = None,
        tokens: TokenStore | None = None,
        super_resolution: SuperResolution | None = None,
        retrieval: RetrieveConfig | None = None,
    ) -> None:
        self.model, self.image_tokenizer, self.text_tokenizer = model, image_tokenizer, text_tokenizer
        self.decoding, self.encoder, self.memory_bank, self.tokens = decoding, encoder, memory_bank, tokens
        self.super_resolution, self.retrieval = super_resolution, retrieval or RetrieveConfig()

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
    ) -> Generator:
        """Load from the directories of the stages.

        Without ``encoder`` there is no reranking, without ``memory_bank`` no retrieval, without ``super_resolution`` no upscaling.
        ``retrieval`` has the rules by which neighbours are taken; None: the package's.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded_encoder, loaded_bank, upscaler = None, None, None
        if encoder is not None:
            from cm3leon.retrieval.encoder import Encoder

            loaded_encoder = Encoder.load(encoder).to(device)
        if memory_bank is not None:
            from cm3leon.retrieval.index import MemoryBank

            loaded_bank = MemoryBank.load(memory_bank)
        if super_resolution is not None:
            from cm3leon.super_resolution import SuperResolution

            upscaler = SuperResolution.load(super_resolution).to(device)
        return cls(
            Decoder.load(model, device),
            ImageTokenizer.load(image_tokenizer, device),
            TextTokenizer.load(text_tokenizer),
            decoding,
            loaded_encoder,
            loaded_bank,
            TokenStore(tokens) if tokens is not None else None,
            upscaler,
            retrieval,
        )

    @classmethod
    def from_bundle(cls, path: str | Path, device: str | None = None) -> Generator:
        """Load a bundle directory.

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
            decoding=DecodingConfig.model_validate_json((path / "decoding.json").read_text()),
            encoder=path / "encoder",
            memory_bank=path / "memory_bank",
            tokens=path / "memory_bank" / "tokens",
            super_resolution=upscaler if upscaler.is_dir() else None,
            retrieval=RetrieveConfig.model_validate_json(retrieval.read_text()) if retrieval.is_file() else None,
            device=device,
        )

    @classmethod
    def from_registry(cls, uri: str = "models:/cm3leon@champion", tracking_uri: str | None = None) -> Generator:
        """Load a registered model, by default the champion.

        Raises:
            LookupError: if the registry has no such model.
        """
        from cm3leon.registry import fetch_bundle

        return cls.from_bundle(fetch_bundle(uri, tracking_uri))

    def text_to_image(
        self,
        prompts: Sequence[str],
        num_images: int = 1,
        *,
        seed: int = 0,
        temperature: float | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        candidates: int | None = None,
        documents: int | None = None,
        likelihood: float | None = None,
    ) -> list[list[GeneratedImage]]:
        """Draw ``num_images`` images for each prompt, best first.

        For each image returned ``candidates`` are drawn and ranked by CLIP score, and by how likely the model finds the prompt as the
        image's caption, weighted by ``likelihood``. A candidate's noise depends on ``seed`` and its number
        alone. None takes the bundle's decoding default. Retrieved documents that do not fit in the context beside the prompt are left
        out, the least relevant first; ``neighbours`` of an image are those that stood before it.

        Raises:
            BadInputError: for an empty prompt or an impossible setting.
            PromptTooLongError: if a prompt does not fit in the context.
        """
        asked = {"temperature": temperature, "top_p": top_p, "guidance": guidance, "candidates": candidates, "documents": documents}
        asked["likelihood"] = likelihood
        settings = self.settings({k: v for k, v in asked.items() if v is not None})
        for number, prompt in enumerate(prompts):
            if not prompt.strip():
                raise BadInputError(f"prompt {number} is empty")
        if num_images < 1:
            raise BadInputError(f"num_images must be at least 1, found {num_images}")
        draws = num_images * settings.candidates
        neighbours = [self._fitting(prompt, self.neighbours(prompt, settings.documents)) for prompt in prompts]
        jobs = [(row, seed + number) for row in range(len(prompts)) for number in range(draws)]
        drawn: list[list[GeneratedImage]] = [[] for _ in prompts]
        chunks = [jobs[i : i + ROWS] for i in range(0, len(jobs), ROWS)]
        for chunk in track(chunks, "drawing", unit="batches") if len(chunks) > 1 else chunks:
            for (row, image_seed), image, codes in self._draw(chunk, prompts, neighbours, settings):
                used = settings.model_dump(exclude={"max_text_tokens"})
                drawn[row].append(GeneratedImage(image, prompts[row], image_seed, codes, None, neighbours[row], used))
        if draws > num_images:
            self.rank(drawn, settings.likelihood)
        return [images[:num_images] for images in drawn]

    def settings(self, changes: dict[str, Any]) -> DecodingConfig:
        """The decoding defaults with changes, checked.

        Raises:
            BadInputError: naming the setting and what is allowed.
        """
        from pydantic import ValidationError

        try:
            return DecodingConfig.model_validate({**self.decoding.model_dump(), **changes})
        except ValidationError as error:
            first = error.errors()[0]
            raise BadInputError(f"{first['loc'][0]}: {first['msg']} (found {first['input']!r})") from None

    def _draw(
        self, jobs: list[tuple[int, int]], prompts: Sequence[str], neighbours: list[list[dict[str, Any]]], settings: DecodingConfig
    ) -> list[tuple[tuple[int, int], Image.Image, np.ndarray]]:
        mask = np.array([self.model.vocabulary.sentinel(0)])
        conditional = [self._image_prompt(prompts[row], neighbours[row]) for row, _ in jobs]
        unconditional = [image_prompt(mask, [self._segments(n["id"]) for n in neighbours[row]]) for row, _ in jobs]
        codes = generate_images(
            self.model,
            conditional,
            unconditional,
            [image_seed for _, image_seed in jobs],
            temperature=settings.temperature,
            top_p=settings.top_p,
            guidance=settings.guidance,
        )
        return list(zip(jobs, self.decode(codes), codes, strict=True))

    def _image_prompt(self, prompt: str, neighbours: Sequence[dict[str, Any]]) -> Tokens:
        text = self.model.vocabulary.text(self.text_tokenizer.encode(prompt))
        return image_prompt(text, [self._segments(n["id"]) for n in neighbours])

    def _segments(self, name: str) -> list[tuple[str, Tokens]]:
        """A document of the memory bank as it stands before a prompt: its first caption, the one shown, and its image."""
        assert self.tokens is not None
        document, vocabulary = self.tokens.by_id(name), self.model.vocabulary
        return [("text", vocabulary.text(document.texts[0])), ("image", vocabulary.image(document.codes))]

    def fits(self, prompt: str, neighbours: Sequence[dict[str, Any]] = ()) -> bool:
        """Whether a prompt, its retrieved documents and the image to draw fit in the context."""
        return len(self._image_prompt(prompt, neighbours)) + self.model.vocabulary.tokens_per_image <= self.model.spec.context

    def _fitting(self, prompt: str, neighbours: list[dict[str, Any]]) -> list[dict[str, Any]]:
        while neighbours and not self.fits(prompt, neighbours):
            neighbours = neighbours[:-1]
        return neighbours

    def shorten(self, prompt: str) -> str:
        """As much of a prompt's beginning as fits in the context with the image to draw; what fits already stays as it is."""
        vocabulary = self.model.vocabulary
        around = len(image_prompt(np.array([vocabulary.sentinel(0)]), [])) - 1 + vocabulary.tokens_per_image
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

    def neighbours(self, prompt: str, count: int) -> list[dict[str, Any]]:
        """Documents of the memory bank that stand before a prompt: id, caption, licence, attribution, source, score.

        Raises:
            BadInputError: if documents are asked for and the generator has no memory bank.
        """
        if count == 0:
            return []
        if self.encoder is None or self.memory_bank is None or self.tokens is None:
            raise BadInputError("documents > 0 needs a bundle with an encoder and a memory bank")
        from cm3leon.retrieval.strategy import find

        wanted = self.retrieval.model_copy(update={"candidates_per_modality": count})
        [found] = find(self.memory_bank, wanted, text=self.encoder.encode_texts([prompt]))
        documents = self.memory_bank.documents
        return [{**documents.iloc[n.position].to_dict(), "score": round(n.score, 4)} for n in found]

    def rank(self, drawn: list[list[GeneratedImage]], likelihood: float) -> None:
        """Score images by CLIP similarity to their prompts and sort each list, best first.

        Args:
            likelihood: weight, beside the CLIP score, of the prompt's log-likelihood as the image's caption under this model, nats.

        Raises:
            BadInputError: if the generator has no encoder.
        """
        if self.encoder is None:
            raise BadInputError("candidates > 1 needs a bundle with an encoder to rank them")
        flat = [image for images in drawn for image in images]
        vectors = self.encoder.encode_images([g.image for g in flat])
        prompts = list(dict.fromkeys(g.prompt for g in flat))
        texts = dict(zip(prompts, self.encoder.encode_texts(prompts), strict=True))
        for generated, vector in zip(flat, vectors, strict=True):
            generated.score = float(vector @ texts[generated.prompt])
        for images in drawn:
            said = self.caption_log_likelihoods(images) if likelihood else np.zeros(len(images))
            ranks = [-(image.score or 0.0) - likelihood * value for image, value in zip(images, said, strict=True)]
            images[:] = [images[int(place)] for place in np.argsort(ranks, kind="stable")]

    def caption_log_likelihoods(self, images: Sequence[GeneratedImage]) -> np.ndarray:
        """How likely the model is to caption each of some images of one prompt with that prompt, nats; (len(images),)."""
        template, vocabulary, found = TASKS["caption"].templates[0], self.model.vocabulary, []
        for start in range(0, len(images), ROWS):
            part = images[start : start + ROWS]
            prompts = [answer_prompt(template, {}, image.codes, vocabulary, self.text_tokenizer) for image in part]
            room = self.model.spec.context - len(prompts[0])
            text = vocabulary.text(self.text_tokenizer.encode(part[0].prompt)[:room])
            found.append(text_log_likelihoods(self.model, prompts, text).cpu().numpy())
        return np.concatenate(found)

    def encode(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Codes (B, tokens_per_image) of images of any size; each is fitted to the tokenizer's square."""
        size = self.image_tokenizer.spec.image_size
        parts = []
        for start in range(0, len(images), PICTURES):
            pixels = np.stack([np.asarray(fit_square(image, size)) for image in images[start : start + PICTURES]])
            parts.append(self.image_tokenizer.encode(to_float(torch.from_numpy(pixels), self.model.device)).cpu().numpy())
        return np.concatenate(parts)

    def decode(self, codes: np.ndarray) -> list[Image.Image]:
        """Images of codes (B, tokens_per_image)."""
        parts = torch.from_numpy(codes).split(PICTURES)
        return [image for part in parts for image in image_of(self.image_tokenizer.decode(part.to(self.model.device)))]

    def upscale(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Images enlarged by the bundle's upscaler.

        Raises:
            BadInputError: if the generator has none.
        """
        if self.super_resolution is None:
            raise BadInputError("upscaling needs a bundle with super_resolution/")
        return self.super_resolution.upscale(images)

    def caption(self, images: Sequence[Image.Image], *, long: bool = False, temperature: float = 0.0, seed: int = 0) -> list[str]:
        """Describe each image, briefly or at length."""
        template = TASKS["long_caption" if long else "caption"].templates[0]
        return self._answer(template, [{} for _ in images], images, temperature, seed)

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str], *, temperature: float = 0.0, seed: int = 0) -> list[str]:
        """Answer one question about each image.

        Raises:
            BadInputError: if the lists differ in length or a question is empty.
            PromptTooLongError: if a question leaves no room for an answer.
        """
        if len(images) != len(questions):
            raise BadInputError(f"{len(images)} images but {len(questions)} questions; give one question for each image")
        if any(not question.strip() for question in questions):
            raise BadInputError("a question is empty")
        return self._answer(TASKS["vqa"].templates[0], [{"question": q} for q in questions], images, temperature, seed)

    def _answer(
        self, template: str, values: Sequence[dict[str, str]], images: Sequence[Image.Image], temperature: float, seed: int
    ) -> list[str]:
        answers: list[str] = []
        starts = range(0, len(images), ROWS)
        for start in track(starts, "answering", unit="batches") if len(starts) > 1 else starts:
            part = slice(start, start + ROWS)
            codes = self.encode(images[part])
            prompts = [
                answer_prompt(template, given, row, self.model.vocabulary, self.text_tokenizer)
                for given, row in zip(values[part], codes, strict=True)
            ]
            rooms = [min(self.decoding.max_text_tokens, self.model.spec.context - len(prompt)) for prompt in prompts]
            for given, room, prompt in zip(values[part], rooms, prompts, strict=True):
                if room < 1:
                    what = f"the question {given['question'][:60]!r}" if "question" in given else "the instruction"
                    raise PromptTooLongError(
                        f"{what} and the image take {len(prompt)} tokens and leave no room for an answer in the context of "
                        f"{self.model.spec.context}; shorten it"
                    )
            found = [""] * len(prompts)
            for room in sorted(set(rooms)):  # those with little room go apart, so that a long question does not cut others' answers
                same = [row for row, own in enumerate(rooms) if own == room]
                options = {"temperature": temperature, "top_p": self.decoding.top_p}
                texts = generate_texts(self.model, [prompts[row] for row in same], [seed] * len(same), max_tokens=room, **options)
                for row, ids in zip(same, texts, strict=True):
                    found[row] = self.text_tokenizer.decode(ids).strip()
            answers += found
        return answers
