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
from cm3leon.data.sequences import document_segments
from cm3leon.data.tokens import TokenStore
from cm3leon.documents import Tokens
from cm3leon.generation.engine import generate_images, generate_texts
from cm3leon.model import Decoder
from cm3leon.progress import track
from cm3leon.tasks import TASKS, answer_prompt, image_prompt
from cm3leon.tokenizers.image import ImageTokenizer
from cm3leon.tokenizers.image_training import to_float
from cm3leon.tokenizers.text import TextTokenizer

if TYPE_CHECKING:
    from cm3leon.retrieval.encoder import Encoder
    from cm3leon.retrieval.index import MemoryBank

ROWS = 128
"""Sequences decoded together."""


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
    ) -> None:
        self.model, self.image_tokenizer, self.text_tokenizer = model, image_tokenizer, text_tokenizer
        self.decoding, self.encoder, self.memory_bank, self.tokens = decoding, encoder, memory_bank, tokens

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
        device: str | None = None,
    ) -> Generator:
        """Load from the directories of the stages. Without ``encoder`` there is no reranking, without ``memory_bank`` no retrieval."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded_encoder, loaded_bank = None, None
        if encoder is not None:
            from cm3leon.retrieval.encoder import Encoder

            loaded_encoder = Encoder.load(encoder)
        if memory_bank is not None:
            from cm3leon.retrieval.index import MemoryBank

            loaded_bank = MemoryBank.load(memory_bank)
        return cls(
            Decoder.load(model, device),
            ImageTokenizer.load(image_tokenizer, device),
            TextTokenizer.load(text_tokenizer),
            decoding,
            loaded_encoder,
            loaded_bank,
            TokenStore(tokens) if tokens is not None else None,
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
        return cls.from_parts(
            model=path,
            image_tokenizer=path / "image_tokenizer",
            text_tokenizer=path / "text_tokenizer",
            decoding=DecodingConfig.model_validate_json((path / "decoding.json").read_text()),
            encoder=path / "encoder",
            memory_bank=path / "memory_bank",
            tokens=path / "memory_bank" / "tokens",
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
    ) -> list[list[GeneratedImage]]:
        """Draw ``num_images`` images for each prompt, best first.

        For each image returned ``candidates`` are drawn and ranked by CLIP score. A candidate's noise depends on ``seed`` and its number
        alone. None takes the bundle's decoding default.

        Raises:
            BadInputError: for an empty prompt or an impossible setting.
            PromptTooLongError: if a prompt does not fit in the context.
        """
        asked = {"temperature": temperature, "top_p": top_p, "guidance": guidance, "candidates": candidates, "documents": documents}
        settings = self.settings({k: v for k, v in asked.items() if v is not None})
        for number, prompt in enumerate(prompts):
            if not prompt.strip():
                raise BadInputError(f"prompt {number} is empty")
        if num_images < 1:
            raise BadInputError(f"num_images must be at least 1, found {num_images}")
        draws = num_images * settings.candidates
        neighbours = [self.neighbours(prompt, settings.documents) for prompt in prompts]
        jobs = [(row, seed + number) for row in range(len(prompts)) for number in range(draws)]
        drawn: list[list[GeneratedImage]] = [[] for _ in prompts]
        chunks = [jobs[i : i + ROWS] for i in range(0, len(jobs), ROWS)]
        for chunk in track(chunks, "drawing", unit="batches") if len(chunks) > 1 else chunks:
            for (row, image_seed), image, codes in self._draw(chunk, prompts, neighbours, settings):
                used = settings.model_dump(include={"temperature", "top_p", "guidance", "candidates", "documents"})
                drawn[row].append(GeneratedImage(image, prompts[row], image_seed, codes, None, neighbours[row], used))
        if draws > num_images:
            self.rank(drawn)
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
        vocabulary = self.model.vocabulary
        conditional, unconditional = [], []
        for row, _ in jobs:
            retrieved = [self._segments(n["id"]) for n in neighbours[row]]
            conditional.append(image_prompt(vocabulary.text(self.text_tokenizer.encode(prompts[row])), retrieved))
            unconditional.append(image_prompt(np.array([vocabulary.sentinel(0)]), retrieved))
        codes = generate_images(
            self.model,
            conditional,
            unconditional,
            [image_seed for _, image_seed in jobs],
            temperature=settings.temperature,
            top_p=settings.top_p,
            guidance=settings.guidance,
        )
        images = image_of(self.image_tokenizer.decode(torch.from_numpy(codes).to(self.model.device)))
        return list(zip(jobs, images, codes, strict=True))

    def _segments(self, name: str) -> list[tuple[str, Tokens]]:
        assert self.tokens is not None
        return document_segments(self.tokens.by_id(name), self.model.vocabulary, np.random.default_rng(0))

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

        wanted = RetrieveConfig(candidates_per_modality=count)
        [found] = find(self.memory_bank, wanted, text=self.encoder.encode_texts([prompt]))
        documents = self.memory_bank.documents
        return [{**documents.iloc[n.position].to_dict(), "score": round(n.score, 4)} for n in found]

    def rank(self, drawn: list[list[GeneratedImage]]) -> None:
        """Score images by CLIP similarity to their prompts and sort each list, best first.

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
            images.sort(key=lambda g: -(g.score or 0.0))

    def encode(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Codes (B, tokens_per_image) of images of any size; each is fitted to the tokenizer's square."""
        size = self.image_tokenizer.spec.image_size
        pixels = np.stack([np.asarray(fit_square(image, size)) for image in images])
        return self.image_tokenizer.encode(to_float(torch.from_numpy(pixels), self.model.device)).cpu().numpy()

    def caption(self, images: Sequence[Image.Image], *, long: bool = False, temperature: float = 0.0, seed: int = 0) -> list[str]:
        """Describe each image, briefly or at length."""
        template = TASKS["long_caption" if long else "caption"].templates[0]
        return self._answer(template, [{} for _ in images], images, temperature, seed)

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str], *, temperature: float = 0.0, seed: int = 0) -> list[str]:
        """Answer one question about each image.

        Raises:
            BadInputError: if the lists differ in length or a question is empty.
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
            room = min(self.decoding.max_text_tokens, self.model.spec.context - max(len(p) for p in prompts))
            seeds = [seed] * len(prompts)
            texts = generate_texts(self.model, prompts, seeds, temperature=temperature, top_p=self.decoding.top_p, max_tokens=room)
            answers += [self.text_tokenizer.decode(ids).strip() for ids in texts]
        return answers
