"""Generated text: answers about images, and blanks of texts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from PIL import Image

from cm3leon.config.schema import DecodingConfig
from cm3leon.generation.checks import BadInputError, check_room, free_tokens
from cm3leon.generation.engine import Continuation, generate_texts
from cm3leon.generation.parts import Parts
from cm3leon.generation.prompts import answer_prompt, blanks_prompt
from cm3leon.generation.results import GeneratedText
from cm3leon.generation.rows import batch_shape, sequence_bytes
from cm3leon.models.decoder import Decoder
from cm3leon.sequence.grammar import EOSS, Prompt
from cm3leon.sequence.tasks import TASKS, Fields
from cm3leon.utils.memory import free_memory
from cm3leon.utils.progress import track

BLANK = re.compile("_{3,}")
"""A blank of a text to fill, however long."""


def continue_prompts(
    model: Decoder, prompts: Sequence[Prompt], seed: int, settings: DecodingConfig, ends: tuple[int, ...] = (EOSS,)
) -> list[Continuation]:
    """Text after each prompt, of at most ``max_text_tokens`` or as many as there is room for; each prompt has the same seed.

    Prompts with equally much room are one batch, so that a long prompt does not cut the texts of others.
    """
    rooms = [min(settings.max_text_tokens, free_tokens(model, [prompt])) for prompt in prompts]
    free, batches = free_memory(model.device), []
    for room in sorted(set(rooms)):
        group = [row for row, own in enumerate(rooms) if own == room]
        longest = max(len(prompts[row]) for row in group)
        together, _ = batch_shape(sequence_bytes(model, longest, room), 1, 1, free)
        batches += [group[start : start + together] for start in range(0, len(group), together)]
    found: dict[int, Continuation] = {}
    for rows in track(batches, "generating texts", unit="batches") if len(batches) > 1 else batches:
        texts = generate_texts(
            model,
            [prompts[row] for row in rows],
            [seed] * len(rows),
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=rooms[rows[0]],
            ends=ends,
        )
        found |= dict(zip(rows, texts, strict=True))
    return [found[row] for row in range(len(prompts))]


def answer(
    parts: Parts,
    task: str,
    values: Sequence[Fields],
    images: Sequence[Image.Image],
    seed: int,
    settings: DecodingConfig,
    template: int = 0,
) -> list[GeneratedText]:
    """Answers of a task about images: the infilled field of its template.

    Args:
        values: for each image the texts of the template's other fields.
        template: which of the task's templates.

    Raises:
        PromptTooLongError: if a question leaves no room for an answer.
    """
    prompts = []
    for given, codes in zip(values, parts.encode_images(images), strict=True):
        prompt = answer_prompt(TASKS[task].templates[template], given, codes, parts.model.vocabulary, parts.text_tokenizer)
        what = f"the question {given['question'][:60]!r}" if "question" in given else "the instruction"
        check_room(parts.model, [prompt], 1, f"{what} with its image,")
        prompts.append(prompt)
    found = continue_prompts(parts.model, prompts, seed, settings)
    used = {"temperature": settings.temperature, "top_p": settings.top_p}
    return [GeneratedText(parts.text_tokenizer.decode(ids).strip(), seed, ids, used, task) for ids, _ in found]


def fill_blanks(
    parts: Parts, texts: Sequence[str], images: Sequence[Image.Image] | None, seed: int, settings: DecodingConfig
) -> list[GeneratedText]:
    """Texts with each blank, ``___`` or longer, filled, from left to right.

    Args:
        images: that the texts are about; None: there are none.

    Raises:
        BadInputError: if a text has no blank or more than the model has masks.
        PromptTooLongError: if a text leaves no room for what goes into its blanks.
    """
    vocabulary = parts.model.vocabulary
    codes = [None] * len(texts) if images is None else list(parts.encode_images(images))
    # 1. Each text with a mask for each blank, continued from the first.
    pieces = [BLANK.split(text) for text in texts]
    for number, own in enumerate(pieces):
        if not 2 <= len(own) <= vocabulary.sentinels + 1:
            raise BadInputError(f"text {number} must have 1 to {vocabulary.sentinels} blanks (___), found {len(own) - 1}")
    prompts = []
    for own, image in zip(pieces, codes, strict=True):
        # As in training a blank has the space before it, and the text behind it keeps its own.
        texts_around = [own[0].strip(), *(piece.rstrip() for piece in own[1:])]
        prompts.append(blanks_prompt([parts.text_tokens(piece) for piece in texts_around], image, vocabulary))
    # 2. The first blank of all texts, then the second ...: a blank sees what filled those before it.
    spans: list[list[list[int]]] = [[] for _ in texts]
    for blank in range(max((len(own) - 1 for own in pieces), default=0)):
        rows = [row for row, own in enumerate(pieces) if blank < len(own) - 1]
        for row in rows:
            check_room(parts.model, [prompts[row]], 1, f"text {row}, before blank {blank + 1},")
        for row, (ids, _) in zip(rows, continue_prompts(parts.model, [prompts[row] for row in rows], seed, settings), strict=True):
            spans[row].append(ids)
            is_last = blank + 2 == len(pieces[row])
            following = [] if is_last else [vocabulary.sentinel(blank + 1)]
            prompts[row] = prompts[row].followed_by(*vocabulary.text(ids), EOSS, *following)
    # 3. The texts, each blank replaced.
    filled = []
    for own, found in zip(pieces, spans, strict=True):
        words = [parts.text_tokenizer.decode(ids).strip() for ids in found]
        text = "".join(piece + word for piece, word in zip(own, [*words, ""], strict=True))
        tokens = [token for ids in found for token in ids]
        filled.append(GeneratedText(text, seed, tokens, {"temperature": settings.temperature}, "infill_text"))
    return filled
