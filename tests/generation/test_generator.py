"""The user's interface on untrained models: repeatable, independent of the batch, with provenance, and clear about bad input."""

import json

import numpy as np
import pytest
from PIL import Image

from cm3leon import paths
from cm3leon.config import DecodingConfig, RetrieveConfig
from cm3leon.generation.engine import PromptTooLongError
from cm3leon.generation.generator import BadInputError, Generator

PROMPTS = ["a red circle", "two green crosses and a blue square on white"]


@pytest.fixture(scope="module")
def generator(tiny_models):
    parts = {"model": paths.FINETUNED, "image_tokenizer": paths.IMAGE_TOKENIZER, "text_tokenizer": paths.TEXT_TOKENIZER}
    parts |= {"encoder": paths.ENCODER, "memory_bank": paths.INDEX, "tokens": paths.TOKENS, "super_resolution": paths.SUPER_RESOLUTION}
    decoding = DecodingConfig(candidates=2, max_text_tokens=8)
    return Generator.from_parts(**{name: tiny_models / path for name, path in parts.items()}, decoding=decoding)


def codes(results):
    return [[image.codes.tolist() for image in images] for images in results]


def test_the_same_seed_draws_the_same_whatever_else_is_asked(generator):
    both = generator.text_to_image(PROMPTS, num_images=2, seed=3)
    alone = generator.text_to_image(PROMPTS[1:], num_images=2, seed=3)
    assert codes(both)[1] == codes(alone)[0]
    assert codes(both) == codes(generator.text_to_image(PROMPTS, num_images=2, seed=3))
    assert codes(both) != codes(generator.text_to_image(PROMPTS, num_images=2, seed=400))


def test_candidates_are_ranked_by_score_and_the_best_kept(generator):
    [[best]] = generator.text_to_image(PROMPTS[:1], candidates=8, seed=0)
    [ranked] = generator.text_to_image(PROMPTS[:1], num_images=4, candidates=2, seed=0)
    scores = [image.score for image in ranked]
    assert scores == sorted(scores, reverse=True)
    assert best.score == pytest.approx(scores[0], abs=1e-5) and best.seed == ranked[0].seed


def test_likelihood_ranks_beside_the_clip_score(generator):
    def ranked(weight):
        [images] = generator.text_to_image(PROMPTS[1:], num_images=4, candidates=2, likelihood=weight, seed=0)
        said = generator.caption_log_likelihoods(images)
        return [image.score + weight * value for image, value in zip(images, said, strict=True)], [image.seed for image in images]

    clip_alone, mixed, likelihood_alone = ranked(0.0), ranked(0.01), ranked(1e6)
    for scores, _ in (clip_alone, mixed, likelihood_alone):
        assert all(a >= b or a == pytest.approx(b) for a, b in zip(scores, scores[1:], strict=False))
    assert clip_alone[1] != likelihood_alone[1]


def test_an_image_says_where_it_comes_from(generator, tmp_path):
    [[image]] = generator.text_to_image(PROMPTS[:1], candidates=1, documents=1, seed=5)
    assert image.neighbours[0]["licence"] == "CC0-1.0" and {"id", "caption", "attribution", "score"} <= set(image.neighbours[0])
    image.save(tmp_path / "out.png")
    record = json.loads(Image.open(tmp_path / "out.png").text["cm3leon"])
    assert record["prompt"] == PROMPTS[0] and record["seed"] == 5 and record["neighbours"] == image.neighbours
    assert record["settings"]["documents"] == 1


def test_retrieval_changes_what_is_drawn(generator):
    plain = generator.text_to_image(PROMPTS[:1], candidates=1, documents=0)
    retrieved = generator.text_to_image(PROMPTS[:1], candidates=1, documents=1)
    assert codes(plain) != codes(retrieved)


def test_images_of_any_size_are_captioned_and_asked_about(generator):
    pictures = [Image.new("RGB", size, "red") for size in [(32, 32), (90, 40), (7, 300)]]
    assert len(generator.caption(pictures)) == len(generator.caption(pictures, long=True)) == 3
    answers = generator.answer(pictures, ["What?", "What color is it?", "How many objects are there on the picture?"])
    assert all(isinstance(answer, str) for answer in answers)
    assert generator.answer(pictures[1:2], ["What color is it?"]) == answers[1:2]


@pytest.mark.parametrize("text", ["circle " * 300, "ö" * 900, "\U0001f600" * 200])
def test_what_is_too_long_can_be_shortened_to_what_fits(generator, text):
    short = generator.shorten(text)
    assert text.startswith(short) and len(short) > 10
    assert generator.fits(short) and not generator.fits(text) and not generator.fits(short + text[: len(text) // 20])
    assert len(generator.text_to_image([short], candidates=1)) == 1
    question = generator.shorten_question(text)
    assert text.startswith(question) and len(question) > 10
    assert len(generator.answer([Image.new("RGB", (8, 8))], [question])) == 1
    assert generator.shorten("a red circle") == generator.shorten_question("a red circle") == "a red circle"


def test_documents_that_do_not_fit_beside_the_prompt_are_left_out(generator):
    prompt = generator.shorten("circle " * 300)
    [[image]] = generator.text_to_image([prompt], candidates=1, documents=2)
    assert image.neighbours == []
    found = generator.neighbours("a red circle", 2)
    [[roomy]] = generator.text_to_image(["a red circle"], candidates=1, documents=2)
    assert roomy.neighbours == found != []


def test_a_long_question_leaves_the_answers_of_others_as_they_are(generator):
    picture, text = Image.new("RGB", (8, 8), "red"), generator.text_tokenizer
    long = "x"
    while len(text.encode(long)) < 160 - 16 - 30:
        long += " x"
    while True:  # the longest question that leaves room for an answer
        try:
            generator.answer([picture], [long + " x"])
        except PromptTooLongError:
            break
        long += " x"
    both = generator.answer([picture, picture], ["What?", long])
    assert both == generator.answer([picture], ["What?"]) + generator.answer([picture], [long])


def test_a_retrieved_document_stands_with_the_caption_that_is_shown(generator):
    from cm3leon.data.tokens import Document

    codes = np.zeros(generator.model.vocabulary.tokens_per_image, dtype=np.uint16)
    several = Document("m", codes, [np.array(generator.text_tokenizer.encode(text)) for text in ("first", "second", "third")])
    other = Generator(generator.model, generator.image_tokenizer, generator.text_tokenizer, generator.decoding)
    other.tokens = type("Tokens", (), {"by_id": lambda self, name: several})()
    [(_, ids), _] = other._segments("m")
    assert generator.text_tokenizer.decode(ids - generator.model.vocabulary.text_start) == "first"


def test_neighbours_are_taken_by_the_rules_given(generator):
    parts = (generator.encoder, generator.memory_bank, generator.tokens)
    strict = Generator(
        generator.model,
        generator.image_tokenizer,
        generator.text_tokenizer,
        generator.decoding,
        *parts,
        retrieval=RetrieveConfig(max_score=-1.0),
    )
    assert strict.neighbours("a red circle", 2) == [] != generator.neighbours("a red circle", 2)


def test_images_are_encoded_and_decoded_in_parts(generator, monkeypatch):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)) for _ in range(7)]
    codes = generator.encode(pictures)
    decoded = [np.asarray(image) for image in generator.decode(codes)]
    monkeypatch.setattr("cm3leon.generation.generator.PICTURES", 3)
    assert np.array_equal(generator.encode(pictures), codes)
    assert np.abs(np.stack([np.asarray(image) for image in generator.decode(codes)]).astype(int) - decoded).max() <= 1


def test_drawn_images_are_enlarged_by_the_bundles_upscaler(generator):
    [[image]] = generator.text_to_image(PROMPTS[:1], candidates=1)
    [large] = generator.upscale([image.image])
    assert large.size == (64, 64)
    assert np.abs(np.asarray(large.resize((32, 32), Image.Resampling.BOX), dtype=float) - np.asarray(image.image)).mean() < 20
    plain = Generator(generator.model, generator.image_tokenizer, generator.text_tokenizer, generator.decoding)
    with pytest.raises(BadInputError, match="super_resolution"):
        plain.upscale([image.image])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: g.text_to_image(["  "]), BadInputError, "prompt 0 is empty"),
        (lambda g: g.text_to_image(["x"], top_p=1.5), BadInputError, "top_p"),
        (lambda g: g.text_to_image(["x"], num_images=0), BadInputError, "num_images"),
        (lambda g: g.text_to_image(["circle " * 300]), PromptTooLongError, "context of 160"),
        (lambda g: g.answer([Image.new("RGB", (8, 8))], []), BadInputError, "1 images but 0 questions"),
        (lambda g: g.answer([Image.new("RGB", (8, 8))], [" "]), BadInputError, "empty"),
        (lambda g: g.answer([Image.new("RGB", (8, 8))], ["how many " * 200]), PromptTooLongError, "the question 'how many how.*no room"),
    ],
)
def test_bad_input_is_named(generator, call, error, message):
    with pytest.raises(error, match=message):
        call(generator)


def test_without_encoder_ranking_and_retrieval_are_refused(tiny_models):
    plain = Generator.from_parts(
        model=tiny_models / paths.FINETUNED,
        image_tokenizer=tiny_models / paths.IMAGE_TOKENIZER,
        text_tokenizer=tiny_models / paths.TEXT_TOKENIZER,
        decoding=DecodingConfig(candidates=1),
    )
    assert np.asarray(plain.text_to_image(["x"])[0][0].image).shape == (32, 32, 3)
    with pytest.raises(BadInputError, match="rank"):
        plain.text_to_image(["x"], candidates=2)
    with pytest.raises(BadInputError, match="memory bank"):
        plain.text_to_image(["x"], documents=1)


def test_a_directory_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a bundle"):
        Generator.from_bundle(tmp_path)
