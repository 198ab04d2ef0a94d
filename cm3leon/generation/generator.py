"""The user's interface: a trained bundle that draws, captions, answers, edits and infills.

generator = Generator.from_bundle("models/bundle")
[[image]] = generator.text_to_image(["a red circle left of a blue square on a gray background"])
image.save("out.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from cm3leon.config.schema import DecodingConfig
from cm3leon.data.images import fit_square
from cm3leon.generation.drawing import ROWS, Drawing, Gap, draw
from cm3leon.generation.engine import PromptTooLongError, generate_images, generate_texts, log_likelihoods
from cm3leon.generation.parts import BadInputError, Parts
from cm3leon.generation.prompts import Query, answer_prompt, blanks_prompt, image_prompt, infill_prompt
from cm3leon.generation.rerank import read_likelihoods
from cm3leon.generation.results import GeneratedImage, GeneratedText, Neighbor, PairScore, Part
from cm3leon.generation.sampling import Sampler
from cm3leon.sequence.grammar import BREAK, EOS, EOSS, Prompt, build_body
from cm3leon.sequence.tasks import CONDITIONS, TASKS, Box, Fields, SegmentTokens, lay_out, layout_text, reasoning_fields
from cm3leon.utils.progress import track

BLANK = "___"


class Generator(Parts):
    """Draws, captions, answers, edits and infills with a bundle. Lists in, lists out; one call at a time.

    Settings of a call that are not given, or None, are the bundle's decoding defaults (:class:`~cm3leon.config.schema.DecodingConfig`).
    """

    # --- images ----------------------------------------------------------------------------------------------------------

    def text_to_image(
        self,
        prompts: Sequence[str],
        num_images: int = 1,
        *,
        references: Sequence[Image.Image] | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> list[list[GeneratedImage]]:
        """Draw ``num_images`` images for each prompt, best first.

        For each image returned ``candidates`` are drawn and ranked by CLIP score, and by how likely the model finds the prompt as the
        image's caption, weighted by ``likelihood``. A candidate's noise depends on ``seed`` and its number alone. Retrieved documents that
        do not fit in the context beside the prompt are left out, the least relevant first; ``neighbors`` of an image are those that stood
        before it.

        Args:
            references: an image for each prompt, by which documents are retrieved too.
            settings: fields of :class:`~cm3leon.config.schema.DecodingConfig`.

        Raises:
            BadInputError: for an empty prompt or an impossible setting.
            PromptTooLongError: if a prompt does not fit in the context.
        """
        return self._from_text(
            "text_to_image", [{"caption": prompt} for prompt in prompts], prompts, references, num_images, seed, settings
        )

    def write(self, texts: Sequence[str], num_images: int = 1, *, seed: int = 0, **settings: Any) -> list[list[GeneratedImage]]:
        """Draw each text as writing; otherwise as :meth:`text_to_image`."""
        self.check_filled("text", texts)
        return self._from_text("write", [{"text": text} for text in texts], texts, None, num_images, seed, settings)

    def layout_to_image(
        self,
        captions: Sequence[str],
        layouts: Sequence[Sequence[tuple[str, Box]]],
        num_images: int = 1,
        *,
        seed: int = 0,
        **settings: Any,
    ) -> list[list[GeneratedImage]]:
        """Draw each caption with labeled objects at places; boxes in pixels of the drawn image.

        Raises:
            BadInputError: for a box that is empty or outside the image, or a layout without objects.
        """
        self.check_same_length("caption", captions, "layout", layouts)
        self.check_filled("caption", captions)
        size = (self.image_size, self.image_size)
        for number, layout in enumerate(layouts):
            if not layout:
                raise BadInputError(f"layout {number} holds no object; for an image without places use text_to_image")
            self.check_filled("label", [label for label, _ in layout])
            for _, box in layout:
                self.check_inside(f"a box of layout {number}", box, size)
        asked = [
            {"caption": caption, "layout": layout_text([(label, self._shares(box)) for label, box in layout])}
            for caption, layout in zip(captions, layouts, strict=True)
        ]
        return self._from_text("layout_to_image", asked, captions, None, num_images, seed, settings)

    def _shares(self, box: Box) -> Box:
        x0, y0, x1, y1 = (value / self.image_size for value in box)
        return x0, y0, x1, y1

    def _from_text(
        self,
        task: str,
        asked: Sequence[Fields],
        shown: Sequence[str],
        references: Sequence[Image.Image] | None,
        num_images: int,
        seed: int,
        changes: dict[str, Any],
    ) -> list[list[GeneratedImage]]:
        settings = self.settings_of(task, changes)
        self.check_filled("prompt", shown)
        if references is not None:
            self.check_same_length("prompt", shown, "reference", references)
        found = self.neighbors(shown, settings.retrieved_documents, references)
        drawings = []
        for values, name, neighbors in zip(asked, shown, found, strict=True):
            query = self._query(task, values, {})
            while neighbors and not self._fit(query, neighbors):
                neighbors = neighbors[:-1]
            drawings.append(Drawing(name, Query(query, TASKS[task].cfg_dropout[0]), self._streams(task, query, neighbors), neighbors))
        return draw(self, task, drawings, num_images, seed, settings)

    def _query(self, task: str, values: Fields, images: dict[str, np.ndarray]) -> list[SegmentTokens]:
        """The segments before the image to draw, as in training; ``images`` are codes of other pictures."""
        return lay_out(TASKS[task].templates[0], [values], images, self.model.vocabulary, self.text_tokenizer)[0]

    def _streams(self, task: str, query: Sequence[SegmentTokens], neighbors: Sequence[Neighbor] = ()) -> list[Prompt]:
        """The conditional stream, and those in which masks stand for what was asked, which keep the retrieved documents."""
        before = [] if self.memory is None else [self.memory.segments(n, self.model.vocabulary) for n in neighbors]
        return [image_prompt(query, before, self.model.vocabulary, frozenset(masked)) for masked in ((), *TASKS[task].cfg_dropout)]

    def condition_to_image(
        self,
        captions: Sequence[str],
        images: Sequence[Image.Image],
        kinds: Sequence[str],
        num_images: int = 1,
        *,
        seed: int = 0,
        **settings: Any,
    ) -> list[list[GeneratedImage]]:
        """Draw each caption over the structure of an image: edges, a segmentation map, a scribble (``cm3leon.data.tokens.CONDITIONS``).

        Raises:
            BadInputError: for an unknown kind.
        """
        used = self.settings_of("condition_to_image", settings)
        self.check_same_length("caption", captions, "image", images)
        self.check_same_length("caption", captions, "kind", kinds)
        self.check_filled("caption", captions)
        for kind in kinds:
            if kind not in CONDITIONS:
                raise BadInputError(f"unknown condition {kind!r}; known are {', '.join(CONDITIONS)}")
        codes = self.encode(images)
        asked = [
            (caption, {"caption": caption, "kind": kind}, {"condition": own})
            for caption, kind, own in zip(captions, kinds, codes, strict=True)
        ]
        return self._from_pictures("condition_to_image", asked, num_images, seed, used)

    def edit(
        self, images: Sequence[Image.Image], instructions: Sequence[str], num_images: int = 1, *, seed: int = 0, **settings: Any
    ) -> list[list[GeneratedImage]]:
        """Change each image as its instruction says, guided by three streams: ``image_guidance`` keeps the image, ``guidance`` follows the
        instruction.

        Raises:
            BadInputError: if the lists differ in length or an instruction is empty.
        """
        used = self.settings_of("edit", settings)
        self.check_same_length("image", images, "instruction", instructions)
        self.check_filled("instruction", instructions)
        asked = [
            (instruction, {"instruction": instruction}, {"source": own})
            for instruction, own in zip(instructions, self.encode(images), strict=True)
        ]
        return self._from_pictures("edit", asked, num_images, seed, used)

    def _from_pictures(
        self, task: str, asked: Sequence[tuple[str, Fields, dict[str, np.ndarray]]], num_images: int, seed: int, settings: DecodingConfig
    ) -> list[list[GeneratedImage]]:
        """Images drawn from others, without retrieved documents. ``asked``: prompt shown, texts, codes of the other pictures."""
        drawings = []
        for prompt, values, images in asked:
            query = self._query(task, values, images)
            drawings.append(Drawing(prompt, Query(query, TASKS[task].cfg_dropout[0], task != "edit"), self._streams(task, query)))
        return draw(self, task, drawings, num_images, seed, settings)

    def infill(
        self,
        images: Sequence[Image.Image],
        boxes: Sequence[Box],
        captions: Sequence[str],
        num_images: int = 1,
        *,
        seed: int = 0,
        **settings: Any,
    ) -> list[list[GeneratedImage]]:
        """Draw anew what is inside a box of each image, so that the whole shows its caption; boxes in pixels of the given image.

        The box grows to whole patches of the image tokenizer. What is outside stays as the tokenizer gives it back. No guidance: the
        model knows no image with two masks.

        Raises:
            BadInputError: if a box is empty or outside its image.
        """
        self.check_same_length("image", images, "box", boxes)
        self.check_same_length("image", images, "caption", captions)
        self.check_filled("caption", captions)
        used = self.settings({**settings, "guidance": 1.0, "contrastive": 0.0})
        results = []
        for image, box, caption, codes in zip(images, boxes, captions, self.encode(images), strict=True):
            self.check_inside("the box", box, image.size)
            open_codes = self._codes_inside(box, image)
            span = (int(open_codes[0]), int(open_codes[-1]) + 1)
            known = codes.astype(np.int64)
            known[open_codes] = -1
            query = self._query("text_to_image", {"caption": caption}, {})
            prompt = infill_prompt(query[0][1], codes, span, self.model.vocabulary)
            drawing = Drawing(caption, Query(query, TASKS["text_to_image"].cfg_dropout[0]), [prompt])
            results += draw(self, "infill", [drawing], num_images, seed, used, Gap(span, known))
        return results

    def _codes_inside(self, box: Box, image: Image.Image) -> np.ndarray:
        """Numbers of the codes whose patches a box of a picture touches, once the picture is fitted to the tokenizer's square."""
        side = round(self.model.vocabulary.tokens_per_image**0.5)
        mask = Image.new("L", image.size)
        mask.paste(255, (int(box[0]), int(box[1]), int(np.ceil(box[2])), int(np.ceil(box[3]))))
        fitted = np.asarray(fit_square(mask.convert("RGB"), self.image_size))[..., 0] > 0
        touched = fitted.reshape(side, self.image_size // side, side, -1).any((1, 3))
        if not touched.any():
            raise BadInputError(
                f"the box {box} is outside the square that the model sees of an image of {image.width} x {image.height} pixels"
            )
        return np.flatnonzero(touched)

    def fits(self, task: str, values: Fields) -> bool:
        """Whether a task's texts and images fit in the context, with the image to draw or at least one token of an answer.

        Args:
            values: what fills the fields of the task's template (``cm3leon.sequence.tasks``).
        """
        blank = np.zeros(self.model.vocabulary.tokens_per_image, dtype=np.int64)
        if TASKS[task].generates_image:
            return self._fit(self._query(task, values, {"source": blank, "condition": blank}), ())
        prompt = answer_prompt(TASKS[task].templates[0], values, blank, self.model.vocabulary, self.text_tokenizer)
        return len(prompt) < self.model.spec.context

    def _fit(self, query: Sequence[SegmentTokens], neighbors: Sequence[Neighbor]) -> bool:
        longest = max(len(stream) for stream in self._streams("text_to_image", query, neighbors))
        return longest + self.model.vocabulary.tokens_per_image <= self.model.spec.context

    # --- texts -----------------------------------------------------------------------------------------------------------

    def caption(self, images: Sequence[Image.Image], *, long: bool = False, temperature: float = 0.0, seed: int = 0) -> list[GeneratedText]:
        """Describe each image, briefly or at length."""
        task = "long_caption" if long else "caption"
        return self._answer(task, [{} for _ in images], images, temperature, seed)

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[str], *, temperature: float = 0.0, seed: int = 0
    ) -> list[GeneratedText]:
        """Answer one question about each image.

        Raises:
            BadInputError: if the lists differ in length or a question is empty.
            PromptTooLongError: if a question leaves no room for an answer.
        """
        self.check_same_length("image", images, "question", questions)
        self.check_filled("question", questions)
        return self._answer("vqa", [{"question": q} for q in questions], images, temperature, seed)

    def reason(
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
        """Answer a question about each image with one of its options; ``explain``: with the reasons before it.

        :func:`cm3leon.sequence.tasks.conclusion` takes the answer out of an explanation.

        Raises:
            BadInputError: if the lists differ in length, a question is empty or has less than two options.
            PromptTooLongError: if a question leaves no room for an answer.
        """
        contexts = [""] * len(questions) if contexts is None else contexts
        for name, values in (("question", questions), ("options", options), ("context", contexts)):
            self.check_same_length("image", images, name, values)
        self.check_filled("question", questions)
        for number, own in enumerate(options):
            if len(own) < 2:
                raise BadInputError(f"question {number} has {len(own)} options; give at least two")
            self.check_filled("option", own)
        asked = [reasoning_fields(*problem) for problem in zip(questions, options, contexts, strict=True)]
        return self._answer("reasoning", asked, images, temperature, seed, template=0 if explain else 1)

    def _answer(
        self, task: str, values: Sequence[dict[str, str]], images: Sequence[Image.Image], temperature: float, seed: int, template: int = 0
    ) -> list[GeneratedText]:
        settings = self.settings_of(task, {"temperature": temperature, "guidance": 1.0, "contrastive": 0.0})
        text, prompts = TASKS[task].templates[template], []
        for given, codes in zip(values, self.encode(images), strict=True):
            prompts.append(answer_prompt(text, given, codes, self.model.vocabulary, self.text_tokenizer))
            if len(prompts[-1]) >= self.model.spec.context:
                what = f"the question {given['question'][:60]!r}" if "question" in given else "the instruction"
                raise PromptTooLongError(
                    f"{what} and the image take {len(prompts[-1])} tokens and leave no room for an answer in the context of "
                    f"{self.model.spec.context}; shorten it"
                )
        found = self._continue(prompts, seed, settings, (EOSS,))
        used = {"temperature": settings.temperature, "top_p": settings.top_p}
        return [GeneratedText(self.text_tokenizer.decode(ids).strip(), seed, ids, used, task) for ids, _ in found]

    def _continue(
        self, prompts: Sequence[Prompt], seed: int, settings: DecodingConfig, ends: tuple[int, ...]
    ) -> list[tuple[list[int], int | None]]:
        """Text after each prompt, of ``max_text_tokens`` or as many as there is room for, and what ended it.

        Those with little room go apart, so that a long prompt does not cut the texts of others.
        """
        rooms = [min(settings.max_text_tokens, self.model.spec.context - len(prompt)) for prompt in prompts]
        found: dict[int, tuple[list[int], int | None]] = {}
        groups = [[row for row, own in enumerate(rooms) if own == room] for room in sorted(set(rooms))]
        jobs = [group[start : start + ROWS] for group in groups for start in range(0, len(group), ROWS)]
        for rows in track(jobs, "writing", unit="batches") if len(jobs) > 1 else jobs:
            options = {"temperature": settings.temperature, "top_p": settings.top_p, "max_tokens": rooms[rows[0]], "ends": ends}
            texts = generate_texts(self.model, [prompts[row] for row in rows], [seed] * len(rows), **options)
            found |= dict(zip(rows, texts, strict=True))
        return [found[row] for row in range(len(prompts))]

    def infill_text(
        self, texts: Sequence[str], images: Sequence[Image.Image] | None = None, *, temperature: float = 0.0, seed: int = 0
    ) -> list[GeneratedText]:
        """Fill each blank, ``___``, of texts, of images if those are given; the whole texts. Blanks are filled from left to right.

        Raises:
            BadInputError: if a text has no blank or more than the model has masks.
            PromptTooLongError: if a text leaves no room for what goes into its blanks.
        """
        if images is not None:
            self.check_same_length("text", texts, "image", images)
        settings = self.settings({"temperature": temperature})
        vocabulary, context = self.model.vocabulary, self.model.spec.context
        codes = [None] * len(texts) if images is None else list(self.encode(images))
        parts = [text.split(BLANK) for text in texts]
        for number, pieces in enumerate(parts):
            if not 2 <= len(pieces) <= vocabulary.sentinels + 1:
                raise BadInputError(f"text {number} must have 1 to {vocabulary.sentinels} blanks ({BLANK}), found {len(pieces) - 1}")
        prompts = [
            blanks_prompt([self.ids(piece.strip()) for piece in own], image, vocabulary) for own, image in zip(parts, codes, strict=True)
        ]
        found: list[list[list[int]]] = [[] for _ in texts]
        for blank in range(max(len(own) for own in parts) - 1 if parts else 0):
            rows = [row for row, own in enumerate(parts) if blank < len(own) - 1]
            for row in rows:
                if len(prompts[row]) >= context:
                    raise PromptTooLongError(f"text {row} leaves no room for blank {blank + 1} in the context of {context}; shorten it")
            for row, (ids, _) in zip(rows, self._continue([prompts[row] for row in rows], seed, settings, (EOSS,)), strict=True):
                found[row].append(ids)
                following = [vocabulary.sentinel(blank + 1)] if blank + 2 < len(parts[row]) else []
                prompts[row] = prompts[row].followed_by(*(vocabulary.text(ids)), EOSS, *following)
        filled = []
        for own, answers in zip(parts, found, strict=True):
            said = [self.text_tokenizer.decode(answer).strip() for answer in answers]
            text = "".join(piece + word for piece, word in zip(own, [*said, ""], strict=True))
            tokens = [token for answer in answers for token in answer]
            filled.append(GeneratedText(text, seed, tokens, {"temperature": temperature}, "infill_text"))
        return filled

    # --- documents and pairs ---------------------------------------------------------------------------------------------

    def interleave(
        self, documents: Sequence[Sequence[str | Image.Image]], segments: int = 2, *, seed: int = 0, **settings: Any
    ) -> list[list[Part]]:
        """Continue documents of texts and images by up to ``segments`` more, in turn: after a text an image, after an image a text.

        A document ends early where the model ends it. Each is returned whole: what was given as it was, what is new as results.

        Raises:
            BadInputError: for an empty document or text.
            PromptTooLongError: if a document does not fit in the context with what follows.
        """
        used = self.settings(settings | {"guidance": 1.0, "contrastive": 0.0, "candidates": 1})
        return [self._continued(document, segments, seed, used) for document in documents]

    def _continued(self, document: Sequence[str | Image.Image], segments: int, seed: int, used: DecodingConfig) -> list[Part]:
        if not document:
            raise BadInputError("a document to continue needs at least one text or image")
        self.check_filled("text", [part for part in document if isinstance(part, str)])
        vocabulary, settings = self.model.vocabulary, used.model_dump()
        whole: list[Part] = list(document)
        body: list[SegmentTokens] = []
        for part in document:
            ids = self.ids(part) if isinstance(part, str) else vocabulary.image(self.encode([part])[0])
            body.append(("text" if isinstance(part, str) else "image", ids))
        for number in range(segments):
            prompt = build_body([body]).prompt().followed_by(BREAK)
            if body[-1][0] == "text":
                codes = generate_images(self.model, [[prompt]], [[seed + number]], Sampler(used))[0, 0]
                body.append(("image", vocabulary.image(codes)))
                before = self.text_tokenizer.decode((body[-2][1] - vocabulary.text_start).tolist())
                [image] = self.decode(codes[None])
                whole.append(GeneratedImage(image, before, seed + number, codes, settings=settings, task="interleave"))
                continue
            if len(prompt) >= self.model.spec.context:
                raise PromptTooLongError(
                    f"a document of {len(prompt)} tokens leaves no room for a text in the context of {self.model.spec.context}"
                )
            [(text, end)] = self._continue([prompt], seed + number, used, (BREAK, EOS))
            if text:
                body.append(("text", vocabulary.text(text)))
                whole.append(GeneratedText(self.text_tokenizer.decode(text).strip(), seed + number, text, settings, "interleave"))
            if end == EOS or not text:
                break
        return whole

    def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[PairScore]:
        """How likely the model finds each image and text together, nats: the text given the image, and the image given the text.

        Raises:
            BadInputError: if the lists differ in length or a text is empty.
            PromptTooLongError: if a text and an image do not fit in the context.
        """
        self.check_same_length("image", images, "text", texts)
        self.check_filled("text", texts)
        vocabulary, codes = self.model.vocabulary, self.encode(images)
        queries = [Query(self._query("text_to_image", {"caption": text}, {}), TASKS["text_to_image"].cfg_dropout[0]) for text in texts]
        of_texts = read_likelihoods(self.model, queries, list(codes))
        of_images: list[float] = []
        image_positions = np.arange(1, vocabulary.tokens_per_image + 1)
        for start in range(0, len(texts), ROWS):
            part = slice(start, start + ROWS)
            prompts = [image_prompt([("text", self.ids(text))], [], vocabulary) for text in texts[part]]
            wanted = [Prompt(vocabulary.image(row), image_positions) for row in codes[part]]
            of_images += [float(scores.sum()) for scores in log_likelihoods(self.model, prompts, wanted)]
        return [PairScore(float(text), image) for text, image in zip(of_texts, of_images, strict=True)]
