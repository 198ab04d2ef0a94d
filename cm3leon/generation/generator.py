"""The Python interface of a trained bundle: it generates images and texts, one method a task.

    generator = Generator.from_bundle("models/bundle")
    [[image]] = generator.text_to_image(["a red circle left of a blue square on a gray background"])
    image.save("out.png")

A task that generates images takes three steps: check and settle the settings; lay out each request (``image_requests``); generate and rank
its candidates (``candidates``). Tasks that generate text are in ``texts``, documents and scores in ``documents``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image

from cm3leon.config.schema import DecodingConfig
from cm3leon.data.images import to_rgb
from cm3leon.generation.candidates import best_candidates
from cm3leon.generation.checks import BadInputError, check_box, check_not_blank, check_same_length, checked_settings, task_settings
from cm3leon.generation.documents import continue_document, score_pairs
from cm3leon.generation.image_requests import image_request, inpainting_request
from cm3leon.generation.parts import Parts, Precision, load_bundle, load_parts
from cm3leon.generation.results import DocumentPart, GeneratedImage, GeneratedText, PairScore, RetrievedDocument
from cm3leon.generation.settings import UNGUIDED
from cm3leon.generation.shortening import fits, shorten_prompt, shorten_question
from cm3leon.generation.texts import answer, fill_blanks
from cm3leon.sequence.tasks import CONDITIONS, Box, Fields, layout_text, reasoning_fields

if TYPE_CHECKING:
    from cm3leon.generation.memory import Memory
    from cm3leon.models.clip import Encoder
    from cm3leon.models.decoder import Decoder
    from cm3leon.models.super_resolution import SuperResolution
    from cm3leon.models.vqgan import ImageTokenizer
    from cm3leon.sequence.text_tokenizer import TextTokenizer

Images = list[list[GeneratedImage]]
"""For each request its images, best first."""


class Generator:
    """Generates with the parts of a bundle. Lists in, lists out; one call at a time.

    ``settings`` of a method are fields of :class:`~cm3leon.config.schema.DecodingConfig`; those not given, or None, are the bundle's
    defaults. A method of an instruction-tuning task raises :class:`BadInputError` if the model was not trained for the task.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    @classmethod
    def from_bundle(cls, path: str | Path, device: str | None = None, precision: Precision | None = None, compiled: bool = False) -> Self:
        """Load a bundle directory; ``precision`` and ``compiled``: see :func:`~cm3leon.generation.parts.load_decoder`.

        Raises:
            FileNotFoundError: if it is not one.
        """
        return cls(load_bundle(Path(path), device, precision, compiled))

    @classmethod
    def from_parts(cls, **directories: Any) -> Self:
        """Load from the directories of the stages; arguments: see :func:`~cm3leon.generation.parts.load_parts`."""
        return cls(load_parts(**directories))

    # --- images from text ------------------------------------------------------------------------------------------------

    def text_to_image(
        self,
        prompts: Sequence[str],
        num_images: int = 1,
        *,
        references: Sequence[Image.Image] | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Images:
        """Generate ``num_images`` images for each prompt, best first.

        For each image returned ``candidates`` are generated and ranked by CLIP score, and by the log-likelihood of the image and of the
        prompt as its caption, weighted by ``likelihood``. A candidate's noise depends on ``seed`` and its number alone. Retrieved documents
        that do not fit in the context with the prompt are left out, the least relevant first; ``retrieved_documents`` of an image are those
        used.

        Args:
            references: an image for each prompt, by which documents are retrieved too.

        Raises:
            BadInputError: for an empty prompt or an impossible setting, and for references where no documents are retrieved.
            PromptTooLongError: if a prompt does not fit in the context.
        """
        values = [{"caption": prompt} for prompt in prompts]
        return self._from_texts("text_to_image", prompts, values, num_images, seed, settings, references)

    def write(self, texts: Sequence[str], num_images: int = 1, *, seed: int = 0, **settings: Any) -> Images:
        """Generate images of each text as writing; otherwise as :meth:`text_to_image`."""
        check_not_blank("text", texts)
        return self._from_texts("write", texts, [{"text": text} for text in texts], num_images, seed, settings)

    def layout_to_image(
        self,
        captions: Sequence[str],
        layouts: Sequence[Sequence[tuple[str, Box]]],
        num_images: int = 1,
        *,
        seed: int = 0,
        **settings: Any,
    ) -> Images:
        """Generate images of each caption with labeled objects inside boxes, in pixels of the generated image.

        Raises:
            BadInputError: for a box that is empty or outside the image, or a layout without objects.
        """
        check_same_length("caption", captions, "layout", layouts)
        check_not_blank("caption", captions)
        size = self.image_size
        values = []
        for number, (caption, layout) in enumerate(zip(captions, layouts, strict=True)):
            if not layout:
                raise BadInputError(f"layout {number} holds no object; for an image without boxes use text_to_image")
            check_not_blank("label", [label for label, _ in layout])
            objects = []
            for label, box in layout:
                check_box(f"a box of layout {number}", box, (size, size))
                objects.append((label, (box[0] / size, box[1] / size, box[2] / size, box[3] / size)))
            values.append({"caption": caption, "layout": layout_text(objects)})
        return self._from_texts("layout_to_image", captions, values, num_images, seed, settings)

    def _from_texts(
        self,
        task: str,
        prompts: Sequence[str],
        values: Sequence[Fields],
        num_images: int,
        seed: int,
        changes: dict[str, Any],
        references: Sequence[Image.Image] | None = None,
    ) -> Images:
        settings = task_settings(self.parts, task, changes)
        check_not_blank("prompt", prompts)
        if references is not None:
            check_same_length("prompt", prompts, "reference", references)
        if references and settings.retrieved_documents == 0:
            raise BadInputError("references are for retrieving documents, and retrieved_documents is 0; set it, for example to 2")
        retrieved = self.retrieve(prompts, settings.retrieved_documents, references)
        requests = [
            image_request(self.parts, task, prompt, own, documents=found)
            for prompt, own, found in zip(prompts, values, retrieved, strict=True)
        ]
        return best_candidates(self.parts, task, requests, num_images, seed, settings)

    def retrieve(
        self, prompts: Sequence[str] | None, count: int, references: Sequence[Image.Image] | None = None
    ) -> list[list[RetrievedDocument]]:
        """Up to ``count`` documents of the memory bank for each query, which has a text, an image or both; the most relevant first.

        Raises:
            BadInputError: if there is neither text nor image, or no memory bank.
        """
        if prompts is None and references is None:
            raise BadInputError("documents are retrieved by prompts, by images, or by both; give one of them")
        queries = prompts if prompts is not None else references
        if count == 0 or not queries:
            return [[] for _ in queries or []]
        if self.parts.memory is None:
            raise BadInputError("retrieved_documents > 0 needs a bundle with an encoder and a memory bank")
        return self.parts.memory.find(count, prompts, references)

    # --- images from images ----------------------------------------------------------------------------------------------

    def condition_to_image(
        self,
        captions: Sequence[str],
        images: Sequence[Image.Image],
        kinds: Sequence[str],
        num_images: int = 1,
        *,
        seed: int = 0,
        **settings: Any,
    ) -> Images:
        """Generate images of each caption with the structure of a condition image: edges, a segmentation map, a scribble.

        Args:
            kinds: of the condition images (``cm3leon.sequence.tasks.CONDITIONS``).

        Raises:
            BadInputError: for an unknown kind.
        """
        used = task_settings(self.parts, "condition_to_image", settings)
        check_same_length("caption", captions, "image", images)
        check_same_length("caption", captions, "kind", kinds)
        check_not_blank("caption", captions)
        for kind in kinds:
            if kind not in CONDITIONS:
                raise BadInputError(f"unknown condition {kind!r}; known are {', '.join(CONDITIONS)}")
        requests = [
            image_request(self.parts, "condition_to_image", caption, {"caption": caption, "kind": kind}, {"condition": codes})
            for caption, kind, codes in zip(captions, kinds, self.encode(images), strict=True)
        ]
        return best_candidates(self.parts, "condition_to_image", requests, num_images, seed, used)

    def edit(
        self, images: Sequence[Image.Image], instructions: Sequence[str], num_images: int = 1, *, seed: int = 0, **settings: Any
    ) -> Images:
        """Change each image as its instruction says.

        Guided by three streams: ``image_guidance`` keeps the image, ``guidance`` follows the instruction.

        Raises:
            BadInputError: if the lists differ in length or an instruction is empty.
        """
        used = task_settings(self.parts, "edit", settings)
        check_same_length("image", images, "instruction", instructions)
        check_not_blank("instruction", instructions)
        requests = [
            image_request(self.parts, "edit", instruction, {"instruction": instruction}, {"source": codes})
            for instruction, codes in zip(instructions, self.encode(images), strict=True)
        ]
        return best_candidates(self.parts, "edit", requests, num_images, seed, used)

    def infill(
        self,
        images: Sequence[Image.Image],
        boxes: Sequence[Box],
        captions: Sequence[str],
        num_images: int = 1,
        *,
        seed: int = 0,
        **settings: Any,
    ) -> Images:
        """Inpainting: generate the inside of a box of each image again, so that the whole shows its caption.

        The box, in pixels of the image as it is shown (upright, where a camera noted its orientation), grows to whole patches of the image
        tokenizer. Outside it the image is the tokenizer's reconstruction. A model that was not trained for it generates without guidance
        (``training.json``).

        Raises:
            BadInputError: if a box is empty or outside its image; before any image is generated.
        """
        check_same_length("image", images, "box", boxes)
        check_same_length("image", images, "caption", captions)
        check_not_blank("caption", captions)
        guided = self.parts.training is not None and self.parts.training.unprompted_regions
        used = checked_settings(self.decoding, settings if guided else {**settings, **UNGUIDED})
        upright = [to_rgb(image) for image in images]
        for image, box in zip(upright, boxes, strict=True):
            check_box("the box", box, image.size)
        requests = [
            inpainting_request(self.parts, image, codes, box, caption)
            for image, box, caption, codes in zip(upright, boxes, captions, self.encode(upright), strict=True)
        ]
        results: Images = []
        for request in requests:
            results += best_candidates(self.parts, "infill", [request], num_images, seed, used)
        return results

    def upscale(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Images enlarged by the bundle's upscaler.

        Raises:
            BadInputError: if the bundle has none.
        """
        if self.parts.super_resolution is None:
            raise BadInputError("upscaling needs a bundle with super_resolution/")
        return self.parts.super_resolution.upscale(images)

    # --- texts -----------------------------------------------------------------------------------------------------------

    def caption(self, images: Sequence[Image.Image], *, temperature: float = 0.0, seed: int = 0) -> list[GeneratedText]:
        """Describe each image briefly."""
        return self._answer("caption", [{} for _ in images], images, temperature, seed)

    def long_caption(self, images: Sequence[Image.Image], *, temperature: float = 0.0, seed: int = 0) -> list[GeneratedText]:
        """Describe each image in detail."""
        return self._answer("long_caption", [{} for _ in images], images, temperature, seed)

    def vqa(
        self, images: Sequence[Image.Image], questions: Sequence[str], *, temperature: float = 0.0, seed: int = 0
    ) -> list[GeneratedText]:
        """Visual question answering: answer one question about each image.

        Raises:
            BadInputError: if the lists differ in length or a question is empty.
            PromptTooLongError: if a question leaves no room for an answer.
        """
        check_same_length("image", images, "question", questions)
        check_not_blank("question", questions)
        return self._answer("vqa", [{"question": question} for question in questions], images, temperature, seed)

    def reasoning(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        options: Sequence[Sequence[str]],
        contexts: Sequence[str] | None = None,
        *,
        explain: bool = True,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[GeneratedText]:
        """Answer a question about each image with one of its options.

        Args:
            explain: with the reasons first; :func:`cm3leon.sequence.tasks.conclusion` takes the answer out of such a text.

        Raises:
            BadInputError: if the lists differ in length, a question is empty or has fewer than two options.
            PromptTooLongError: if a question leaves no room for an answer.
        """
        contexts = [""] * len(questions) if contexts is None else contexts
        for name, given in (("question", questions), ("options", options), ("context", contexts)):
            check_same_length("image", images, name, given)
        check_not_blank("question", questions)
        for number, own in enumerate(options):
            if len(own) < 2:
                raise BadInputError(f"question {number} has {len(own)} options; give at least two")
            check_not_blank("option", own)
        values = [reasoning_fields(*problem) for problem in zip(questions, options, contexts, strict=True)]
        return self._answer("reasoning", values, images, temperature, seed, template=0 if explain else 1)

    def _answer(
        self, task: str, values: Sequence[Fields], images: Sequence[Image.Image], temperature: float, seed: int, template: int = 0
    ) -> list[GeneratedText]:
        settings = task_settings(self.parts, task, {"temperature": temperature, **UNGUIDED})
        return answer(self.parts, task, values, images, seed, settings, template)

    def infill_text(
        self, texts: Sequence[str], images: Sequence[Image.Image] | None = None, *, temperature: float = 0.0, seed: int = 0
    ) -> list[GeneratedText]:
        """Fill each blank, ``___`` or longer, of texts, about images if given; the whole texts. Blanks are filled from left to right.

        Raises:
            BadInputError: if a text has no blank or more than the model has masks.
            PromptTooLongError: if a text leaves no room for what goes into its blanks.
        """
        if images is not None:
            check_same_length("text", texts, "image", images)
        return fill_blanks(self.parts, texts, images, seed, checked_settings(self.decoding, {"temperature": temperature}))

    # --- documents and pairs ---------------------------------------------------------------------------------------------

    def interleave(
        self, documents: Sequence[Sequence[str | Image.Image]], segments: int = 2, *, seed: int = 0, **settings: Any
    ) -> list[list[DocumentPart]]:
        """Continue documents of texts and images by up to ``segments`` more, in turn: after a text an image, after an image a text.

        A document ends early where the model ends it. Each is returned whole: what was given as it was, what is new as results.

        Raises:
            BadInputError: for an empty document or text.
            PromptTooLongError: if a document does not fit in the context with what follows.
        """
        return [[*document, *self.continued(document, segments, seed=seed, **settings)] for document in documents]

    def continued(
        self, document: Sequence[str | Image.Image], segments: int = 2, *, seed: int = 0, **settings: Any
    ) -> Iterator[GeneratedText | GeneratedImage]:
        """What :meth:`interleave` adds to a document, each text and image as soon as it is generated.

        Raises:
            BadInputError, PromptTooLongError: as :meth:`interleave`; also after some of them.
        """
        used = checked_settings(self.decoding, {**settings, **UNGUIDED, "candidates": 1})
        return continue_document(self.parts, document, segments, seed, used)

    def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[PairScore]:
        """How likely the model finds each image and text together, nats: the text given the image, and the image given the text.

        Raises:
            BadInputError: if the lists differ in length or a text is empty.
            PromptTooLongError: if a text and an image do not fit in the context.
        """
        check_same_length("image", images, "text", texts)
        check_not_blank("text", texts)
        return score_pairs(self.parts, images, texts)

    # --- lengths ---------------------------------------------------------------------------------------------------------

    def fits(self, task: str, values: Fields) -> bool:
        """See :func:`cm3leon.generation.shortening.fits`."""
        return fits(self.parts, task, values)

    def shorten(self, prompt: str) -> str:
        """See :func:`cm3leon.generation.shortening.shorten_prompt`."""
        return shorten_prompt(self.parts, prompt)

    def shorten_question(self, question: str) -> str:
        """See :func:`cm3leon.generation.shortening.shorten_question`."""
        return shorten_question(self.parts, question)

    # --- the parts, for evaluation and serving ---------------------------------------------------------------------------

    def encode(self, images: Sequence[Image.Image]) -> np.ndarray:
        """See :meth:`cm3leon.generation.parts.Parts.encode_images`."""
        return self.parts.encode_images(images)

    def decode(self, codes: np.ndarray) -> list[Image.Image]:
        """See :meth:`cm3leon.generation.parts.Parts.decode_images`."""
        return self.parts.decode_images(codes)

    @property
    def image_size(self) -> int:
        """Side of generated images, pixels."""
        return self.parts.image_size

    @property
    def trained_tasks(self) -> frozenset[str]:
        """Instruction-tuning tasks that the model was trained for."""
        return self.parts.trained_tasks

    @property
    def decoding(self) -> DecodingConfig:
        """The decoding defaults."""
        return self.parts.decoding

    @property
    def model(self) -> Decoder:
        """The decoder."""
        return self.parts.model

    @property
    def image_tokenizer(self) -> ImageTokenizer:
        """The VQ-GAN."""
        return self.parts.image_tokenizer

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The text tokenizer."""
        return self.parts.text_tokenizer

    @property
    def encoder(self) -> Encoder | None:
        """The CLIP encoder, if there is one."""
        return self.parts.encoder

    @property
    def memory(self) -> Memory | None:
        """The memory bank, if there is one."""
        return self.parts.memory

    @property
    def super_resolution(self) -> SuperResolution | None:
        """The upscaler, if there is one."""
        return self.parts.super_resolution
