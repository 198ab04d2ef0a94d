"""Interleaved generation, which continues documents of texts and images, and the likelihood of image-text pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from cm3leon.config.schema import DecodingConfig
from cm3leon.generation.checks import BadInputError, check_not_blank, check_room
from cm3leon.generation.engine import MAX_ROWS, generate_images, log_likelihoods
from cm3leon.generation.image_requests import Query
from cm3leon.generation.parts import Parts
from cm3leon.generation.prompts import image_prompt, likelihood_pair
from cm3leon.generation.rerank import caption_log_likelihoods
from cm3leon.generation.results import GeneratedImage, GeneratedText, PairScore
from cm3leon.generation.sampling import Sampler
from cm3leon.generation.texts import continue_prompts
from cm3leon.sequence.grammar import BREAK, EOS, Prompt, build_body
from cm3leon.sequence.tasks import SegmentTokens


def continue_document(
    parts: Parts, document: Sequence[str | Image.Image], segments: int, seed: int, settings: DecodingConfig
) -> Iterator[GeneratedText | GeneratedImage]:
    """Up to ``segments`` more texts and images in turn; see :meth:`~cm3leon.generation.generator.Generator.interleave`.

    Segment ``n`` of those that are new has the seed ``seed + n``.
    """
    if not document:
        raise BadInputError("a document to continue needs at least one text or image")
    check_not_blank("text", [part for part in document if isinstance(part, str)])
    model, vocabulary = parts.model, parts.model.vocabulary
    used = settings.model_dump()
    body: list[SegmentTokens] = []
    for part in document:
        if isinstance(part, str):
            body.append(("text", parts.text_tokens(part)))
        else:
            body.append(("image", vocabulary.image(parts.encode_images([part])[0])))
    for number in range(segments):
        prompt = build_body([body]).prompt().followed_by(BREAK)
        modality, ids = body[-1]
        if modality == "text":
            # After a text an image.
            codes = generate_images(model, [[prompt]], [[seed + number]], Sampler(settings))[0, 0]
            [image] = parts.decode_images(codes[None])
            caption = parts.text_tokenizer.decode((ids - vocabulary.text_start).tolist())
            body.append(("image", vocabulary.image(codes)))
            yield GeneratedImage(image, caption, seed + number, codes, settings=used, task="interleave")
            continue
        # After an image a text, up to the <break> before the next image or the document's <eos>.
        check_room(model, [prompt], 1, "a document")
        [(text, end)] = continue_prompts(model, [prompt], seed + number, settings, (BREAK, EOS))
        if text:
            body.append(("text", vocabulary.text(text)))
            yield GeneratedText(parts.text_tokenizer.decode(text).strip(), seed + number, text, used, "interleave")
        if end == EOS or not text:
            break


def score_pairs(parts: Parts, images: Sequence[Image.Image], texts: Sequence[str]) -> list[PairScore]:
    """For each pair ``log p(text | image)``, the text infilled after the image, and ``log p(image | text)``, the image after the text.

    Raises:
        PromptTooLongError: if an image and its text do not fit in the context.
    """
    vocabulary = parts.model.vocabulary
    codes = parts.encode_images(images)
    segments: list[list[SegmentTokens]] = [[("text", parts.text_tokens(text))] for text in texts]
    for number, (own, row) in enumerate(zip(segments, codes, strict=True)):
        before, scored = likelihood_pair(own, row, (0,), vocabulary)
        check_room(parts.model, [before], len(scored.tokens) - 1, f"pair {number}")  # the last token is predicted and not read
    of_texts = caption_log_likelihoods(parts.model, [Query(own, (0,)) for own in segments], list(codes))
    of_images: list[float] = []
    image_positions = np.arange(1, vocabulary.tokens_per_image + 1)
    for start in range(0, len(texts), MAX_ROWS):
        batch = slice(start, start + MAX_ROWS)
        prompts = [image_prompt(own, [], vocabulary) for own in segments[batch]]
        continuations = [Prompt(vocabulary.image(row), image_positions) for row in codes[batch]]
        of_images += [float(tokens.sum()) for tokens in log_likelihoods(parts.model, prompts, continuations)]
    return [PairScore(float(text), image) for text, image in zip(of_texts, of_images, strict=True)]
