"""The user's interface on untrained models: repeatable, independent of the batch, with provenance, and clear about bad input."""

import io
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from tests_support import decoding

from cm3leon.config import paths
from cm3leon.config.schema import RetrieveConfig
from cm3leon.data.images import fit_square
from cm3leon.generation.checks import BadInputError, PromptTooLongError
from cm3leon.generation.engine import log_likelihoods
from cm3leon.generation.generator import Generator
from cm3leon.generation.image_requests import inpainting_request
from cm3leon.generation.memory import Memory
from cm3leon.generation.results import GeneratedText
from cm3leon.sequence.grammar import BREAK, EOS, EOSS, Prompt
from cm3leon.sequence.tasks import CONDITIONS, TASKS, Training

PROMPTS = ["a red circle", "two green crosses and a blue square on white"]
RED = Image.new("RGB", (32, 32), "red")


@pytest.fixture(scope="module")
def generator(tiny_parts):
    return Generator.from_parts(**tiny_parts, decoding=decoding(candidates=2, max_text_tokens=8))


def codes(results):
    return [[image.codes.tolist() for image in images] for images in results]


def test_the_same_seed_generates_the_same_in_any_batch(generator):
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


@torch.no_grad()
def caption_likelihood(generator, text, codes, image=False):
    """Log-likelihood of a text and its end as the caption of an image, nats; with ``image`` also of the image."""
    vocabulary = generator.model.vocabulary
    before, then = [EOS, vocabulary.sentinel(0), BREAK], [*vocabulary.image(codes), vocabulary.sentinel(0)]
    start = before if image else before + then
    tokens = torch.tensor([[*before, *then, *vocabulary.text(generator.text_tokenizer.encode(text)), EOSS]])
    logits = generator.model.logits(generator.model(tokens, torch.from_numpy(vocabulary.image_positions(tokens[0].numpy()))[None]))
    return logits[0].log_softmax(-1)[torch.arange(len(start) - 1, tokens.shape[1] - 1), tokens[0, len(start) :]].sum().item()


def test_edits_are_ranked_by_the_likelihood_of_the_instruction_given_both_images(generator):
    [images] = generator.edit([RED], ["make it blue"], 4, guidance=1.0, image_guidance=1.0)
    assert all(image.score is None for image in images)  # an instruction does not describe the image
    vocabulary, [source] = generator.model.vocabulary, generator.encode([RED])
    said = [*vocabulary.text(generator.text_tokenizer.encode("make it blue")), EOSS]
    read = []
    for image in images:
        edit, picture = generator.parts.text_tokens("Edit first image following the instruction"), vocabulary.image(image.codes)
        tokens = [EOS, *edit, BREAK, *vocabulary.image(source), BREAK, vocabulary.sentinel(0), BREAK, *picture, vocabulary.sentinel(0)]
        prompt = Prompt(np.array(tokens), vocabulary.image_positions(np.array(tokens)))
        read.append(log_likelihoods(generator.model, [prompt], [Prompt(np.array(said), np.zeros(len(said), int))])[0].sum())
    assert read == sorted(read, reverse=True)


def test_likelihood_of_image_and_caption_is_added_to_the_clip_score(generator):
    def ranked(weight):
        [images] = generator.text_to_image(PROMPTS[1:], num_images=8, candidates=2, likelihood=weight, seed=0)
        scores = [image.score + weight * caption_likelihood(generator, image.prompt, image.codes, image=True) for image in images]
        return scores, [image.seed for image in images]

    clip_alone, mixed, likelihood_alone = ranked(0.0), ranked(0.01), ranked(1e6)
    for scores, _ in (clip_alone, mixed, likelihood_alone):
        assert all(a >= b or a == pytest.approx(b) for a, b in zip(scores, scores[1:], strict=False))
    assert clip_alone[1] != likelihood_alone[1]


def test_an_image_names_its_retrieved_documents(generator, tmp_path):
    [[image]] = generator.text_to_image(PROMPTS[:1], candidates=1, retrieved_documents=1, seed=5)
    [document] = image.retrieved_documents
    assert document["licence"] == "CC0-1.0" and {"id", "caption", "attribution", "score"} <= set(document)
    image.save(tmp_path / "out.png")
    record = json.loads(Image.open(tmp_path / "out.png").text["cm3leon"])  # type: ignore[attr-defined]
    assert record["prompt"] == PROMPTS[0] and record["seed"] == 5 and record["retrieved_documents"] == image.retrieved_documents
    assert record["settings"]["retrieved_documents"] == 1


def test_a_document_without_attribution_has_none_in_metadata(generator, monkeypatch):
    bank = generator.parts.memory.bank
    attributions = [np.nan, *["someone"] * (len(bank.documents) - 1)]
    monkeypatch.setattr(bank, "documents", bank.documents.assign(attribution=attributions))
    [found] = generator.retrieve(PROMPTS[:1], len(attributions))
    assert [document["attribution"] for document in found].count(None) == 1
    assert all(isinstance(document["attribution"], str | None) for document in found)


def test_retrieval_changes_the_image(generator):
    plain = generator.text_to_image(PROMPTS[:1], candidates=1, retrieved_documents=0)
    retrieved = generator.text_to_image(PROMPTS[:1], candidates=1, retrieved_documents=1)
    assert codes(plain) != codes(retrieved)


def test_images_of_any_size_are_captioned_and_answered_about(generator):
    pictures = [Image.new("RGB", size, "red") for size in [(32, 32), (90, 40), (7, 300)]]
    assert len(generator.caption(pictures)) == len(generator.long_caption(pictures)) == 3
    answers = generator.vqa(pictures, ["What?", "What color is it?", "How many objects are there on the picture?"])
    assert all(isinstance(answer, GeneratedText) and answer.task == "vqa" for answer in answers)
    assert [generator.text_tokenizer.decode(answer.tokens).strip() for answer in answers] == [answer.text for answer in answers]
    assert generator.vqa(pictures[1:2], ["What color is it?"]) == answers[1:2]


@pytest.mark.parametrize("text", ["circle " * 300, "ö" * 900, "\U0001f600" * 200])
def test_long_texts_are_shortened_to_the_context(generator, text):
    short = generator.shorten(text)
    assert text.startswith(short) and len(short) > 10
    assert [generator.fits("text_to_image", {"caption": t}) for t in (short, text, short + text[: len(text) // 20])] == [True, False, False]
    assert len(generator.text_to_image([short], candidates=1)) == 1
    question = generator.shorten_question(text)
    assert text.startswith(question) and len(question) > 10
    assert len(generator.vqa([Image.new("RGB", (8, 8))], [question])) == 1
    assert generator.shorten("a red circle") == generator.shorten_question("a red circle") == "a red circle"


def test_retrieved_documents_that_do_not_fit_are_left_out(generator):
    prompt = generator.shorten("circle " * 300)
    [[image]] = generator.text_to_image([prompt], candidates=1, retrieved_documents=2)
    assert image.retrieved_documents == []
    [found] = generator.retrieve(["a red circle"], 2)
    [[roomy]] = generator.text_to_image(["a red circle"], candidates=1, retrieved_documents=2)
    assert roomy.retrieved_documents == found != []


def test_a_long_question_leaves_the_answers_of_others_as_they_are(generator):
    picture, text = Image.new("RGB", (8, 8), "red"), generator.text_tokenizer
    long = "x"
    while len(text.encode(long)) < 160 - 16 - 30:
        long += " x"
    while True:  # the longest question that leaves room for an answer
        try:
            generator.vqa([picture], [long + " x"])
        except PromptTooLongError:
            break
        long += " x"
    both = generator.vqa([picture, picture], ["What?", long])
    assert both == generator.vqa([picture], ["What?"]) + generator.vqa([picture], [long])


def test_a_retrieved_document_has_its_first_caption(generator):
    from cm3leon.data.tokens import Document

    codes = np.zeros(generator.model.vocabulary.tokens_per_image, dtype=np.uint16)
    several = Document("m", codes, [np.array(generator.text_tokenizer.encode(text)) for text in ("first", "second", "third")])
    tokens = type("Tokens", (), {"by_id": lambda self, name: several})()
    [(_, ids), _] = replace(generator.memory, tokens=tokens).segments({"id": "m"}, generator.model.vocabulary)
    assert generator.text_tokenizer.decode(ids - generator.model.vocabulary.text_start) == "first"


def test_documents_are_retrieved_by_the_rules_given(generator):
    strict: Memory = replace(generator.memory, rules=RetrieveConfig(max_score=-1.0))
    assert strict.find(2, ["a red circle"]) == [[]] != generator.memory.find(2, ["a red circle"])


def test_images_are_encoded_and_decoded_in_batches(generator, monkeypatch):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)) for _ in range(7)]
    codes = generator.encode(pictures)
    decoded = [np.asarray(image) for image in generator.decode(codes)]
    monkeypatch.setattr("cm3leon.generation.parts.BATCH", 3)
    assert np.array_equal(generator.encode(pictures), codes)
    assert np.abs(np.stack([np.asarray(image) for image in generator.decode(codes)]).astype(int) - decoded).max() <= 1


def test_images_are_enlarged_by_the_upscaler(generator):
    [[image]] = generator.text_to_image(PROMPTS[:1], candidates=1)
    [large] = generator.upscale([image.image])
    assert large.size == (64, 64)
    assert np.abs(np.asarray(large.resize((32, 32), Image.Resampling.BOX), dtype=float) - np.asarray(image.image)).mean() < 20
    plain = Generator(replace(generator.parts, super_resolution=None))
    with pytest.raises(BadInputError, match="super_resolution"):
        plain.upscale([image.image])


def test_every_task_is_a_method_of_its_name():
    assert all(callable(getattr(Generator, task)) for task in TASKS)


def test_every_image_task_records_its_settings(generator):
    layout = [("circle", (0, 0, 16, 16)), ("square", (16, 8, 32, 32))]
    results = {
        "write": generator.write(["hello"], 2),
        "layout_to_image": generator.layout_to_image(["a scene"], [layout], 2),
        "condition_to_image": generator.condition_to_image(["a scene"], [RED], [CONDITIONS[0]], 2),
        "edit": generator.edit([RED], ["make it blue"], 2, guidance=3.0),
        "infill": generator.infill([RED], [(8, 8, 24, 24)], ["a red circle"], 2),
    }
    for task, [images] in results.items():
        assert len(images) == 2 and all(image.task == task and image.image.size == (32, 32) for image in images)
        if task != "edit":
            assert [image.score for image in images] == sorted((image.score for image in images), reverse=True)
        assert images[0].record["task"] == task and images[0].settings["temperature"] == generator.decoding.temperature
    assert codes(generator.edit([RED], ["make it blue"], 2, guidance=3.0)) == codes([results["edit"][0]])


def test_infilling_leaves_codes_outside_the_box_as_they_are(generator):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8))
    [before] = generator.encode([picture])
    [images] = generator.infill([picture], [(8.5, 4, 23, 15)], ["a red circle"], 4, candidates=1, temperature=3.0, top_p=1.0)
    side = round(len(before) ** 0.5)  # 4 codes a row, of 8 pixels
    inside = np.zeros((side, side), dtype=bool)
    inside[4 * side // 32 : -(-15 * side // 32), int(8.5 * side / 32) : -(-23 * side // 32)] = True
    for image in images:
        assert np.array_equal(image.codes[~inside.ravel()], before[~inside.ravel()])
    assert len({tuple(image.codes[inside.ravel()]) for image in images}) > 1


def region(generator, picture, box):
    """The codes that inpainting generates again, (side, side), boolean."""
    side = round(generator.model.vocabulary.tokens_per_image**0.5)
    inside = np.zeros(side * side, dtype=bool)
    request = inpainting_request(generator.parts, picture, np.zeros(side * side, dtype=np.int64), box, "a ring")
    inside[request.region.inside] = True
    return inside.reshape(side, side)


def any_box(rng, width, height):
    (x0, x1), (y0, y1) = (np.sort(rng.uniform(0, length, 2)).tolist() for length in (width, height))
    return x0, y0, x1, y1


def masked(size, box):
    mask = Image.new("L", size)
    mask.paste(255, (int(box[0]), int(box[1]), int(np.ceil(box[2])), int(np.ceil(box[3]))))
    return mask


def by_patches(pixels, side):
    return pixels.reshape(side, len(pixels) // side, side, -1).any((1, 3))


def test_a_box_touches_the_patches_of_its_pixels_in_an_image_of_the_models_size(generator):
    rng = np.random.default_rng(1)
    for _ in range(200):
        box = any_box(rng, 32, 32)
        assert np.array_equal(region(generator, RED, box), by_patches(np.asarray(masked((32, 32), box)) > 0, 4)), box


def test_a_box_touches_the_patches_to_which_the_images_resizing_takes_it(generator):
    rng = np.random.default_rng(2)
    for _ in range(200):
        width, height = rng.integers(8, 200, 2).tolist()
        picture, box = Image.new("RGB", (width, height)), any_box(rng, width, height)
        pixel = max(1.0, min(width, height) / 32)  # of the fitted image, or of the given one where that is the larger
        larger = max(0, box[0] - pixel), max(0, box[1] - pixel), min(width, box[2] + pixel), min(height, box[3] + pixel)
        smaller = np.ceil(box[0]), np.ceil(box[1]), max(np.ceil(box[0]), np.floor(box[2])), max(np.ceil(box[1]), np.floor(box[3]))
        least, most = (by_patches(np.asarray(fit_square(masked((width, height), own), 32))[..., 0] > 127, 4) for own in (smaller, larger))
        try:
            found = region(generator, picture, box)
        except BadInputError:
            found = np.zeros((4, 4), dtype=bool)
        assert (least <= found).all() and (found <= most).all(), (picture.size, box)
    for size in (40, 64, 96, 100, 128, 512, 3000):  # an edge on that of a patch ends there
        assert region(generator, Image.new("RGB", (size, size)), (0, size / 4, size / 2, size)).sum() == 2 * 3


def test_all_boxes_are_checked_before_an_image_is_generated(generator, monkeypatch):
    monkeypatch.setattr("cm3leon.generation.generator.best_candidates", lambda *arguments: pytest.fail("an image was generated"))
    wide = Image.new("RGB", (64, 32))
    for picture, box in ((RED, (0, 0, 33, 8)), (wide, (0, 0, 8, 8))):
        with pytest.raises(BadInputError, match="the box"):
            generator.infill([RED, picture], [(0, 0, 8, 8), box], ["a ring", "a ring"])


def test_infilling_takes_the_box_of_an_image_as_it_is_shown(generator):
    pixels = np.random.default_rng(0).integers(256, size=(32, 48, 3), dtype=np.uint8)
    shown, stored = Image.fromarray(pixels), io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8  # shown, it is turned to the left
    shown.transpose(Image.Transpose.ROTATE_270).save(stored, "PNG", exif=exif)
    found = [generator.infill([picture], [(8, 4, 24, 16)], ["a red circle"], candidates=1) for picture in (shown, Image.open(stored))]
    assert codes(found[0]) == codes(found[1])


def test_infilling_is_guided_where_the_model_was_trained_for_it(generator):
    def infilled(**settings):
        return codes(trained.infill([picture], [(8, 8, 32, 32)], ["a red circle"], 2, candidates=1, temperature=1.0, **settings))

    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8))
    found = {}
    for known in (True, False):
        training = Training(frozenset({"text_to_image"}), masked_prompts=True, unprompted_regions=known)
        trained = Generator(replace(generator.parts, training=training))
        found[known] = infilled(guidance=1.0), infilled(guidance=4.0)
    assert found[False][0] == found[False][1] == found[True][0] != found[True][1]


def test_blanks_are_filled_and_the_rest_of_the_text_kept(generator):
    texts = ["a ___ circle", "two ___ and a ___ on white"]
    for images in (None, [RED, RED]):
        found = generator.infill_text(texts, images)
        assert found[0].text.startswith("a ") and found[0].text.endswith(" circle")
        assert found[1].text.startswith("two ") and " and a " in found[1].text and found[1].text.endswith(" on white")
        assert [generator.infill_text([text], images and [RED])[0].text for text in texts] == [each.text for each in found]


def test_the_text_behind_a_blank_is_tokenized_as_in_training(generator, monkeypatch):
    """There a blank takes the space before it, and what follows keeps its own."""
    read = []
    encode = type(generator.parts).text_tokens

    def recorded(parts, text):
        read.append(text)
        return encode(parts, text)

    monkeypatch.setattr(type(generator.parts), "text_tokens", recorded)
    generator.infill_text(["a ___ circle and ___ ring "])
    assert read == ["a", " circle and", " ring"]


def test_a_long_blank_is_one(generator):
    short, long = generator.infill_text(["a ___ circle, ___", "a _____ circle, ____________"])
    assert short == long


def test_nothing_is_made_of_nothing(generator):
    assert generator.caption([]) == generator.edit([], []) == generator.infill([], [], []) == generator.score([], []) == []
    assert generator.vqa([], []) == generator.infill_text([]) == generator.text_to_image([]) == []


def test_documents_are_continued_in_turn(generator):
    [one, other] = generator.interleave([["a red circle"], ["a red circle", RED]], segments=2, seed=1)
    assert one[0] == "a red circle" and one[1].image.size == (32, 32)
    assert (one[1].prompt, one[1].seed, one[1].task) == ("a red circle", 1, "interleave")
    assert other[:2] == ["a red circle", RED] and all(isinstance(part, GeneratedText) and part.seed == 1 for part in other[2:3])
    assert len(one) <= 3 and len(other) <= 4


def test_a_text_is_scored_whole_or_refused(generator):
    """Up to the last length that fits, each word more makes a text less likely: none is left out unseen."""
    found = []
    for words in range(1, 200):
        try:
            found += generator.score([RED], [" ".join(["circle"] * words)])
        except PromptTooLongError:
            break
    assert 5 < len(found) < 199 and all(a.text > b.text for a, b in itertools.pairwise(found))


def test_scores_are_likelihoods_of_the_text_and_of_the_image(generator):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)) for _ in range(2)]
    both = generator.score(pictures, PROMPTS)
    assert all(pair.text < 0 and pair.image < 0 for pair in both)
    alone = [generator.score([picture], [text])[0] for picture, text in zip(pictures, PROMPTS, strict=True)]
    for pair, single in zip(both, alone, strict=True):
        assert (pair.text, pair.image) == pytest.approx((single.text, single.image), rel=1e-4)
    # the image's tokens, one by one, by a full pass over "<eos> text <break> image"
    model, vocabulary = generator.model, generator.model.vocabulary
    [image] = generator.encode(pictures[:1])
    tokens = np.concatenate([[1], generator.parts.text_tokens(PROMPTS[0]), [2], vocabulary.image(image)])
    hidden = model(torch.from_numpy(tokens)[None], torch.from_numpy(vocabulary.image_positions(tokens))[None])
    scores = model.logits(hidden)[0].log_softmax(-1)
    expected = sum(scores[-len(image) - 1 + n, token].item() for n, token in enumerate(vocabulary.image(image)))
    assert both[0].image == pytest.approx(expected, rel=1e-4)


def test_documents_are_retrieved_by_text_by_image_or_by_both(generator):
    white = [Image.new("RGB", (32, 32), "white")]
    memory = replace(generator.memory, rules=RetrieveConfig(max_score=1.1))
    [by_text], [by_image], [by_both] = memory.find(2, PROMPTS[:1]), memory.find(2, None, white), memory.find(2, PROMPTS[:1], white)
    assert len(by_text) == len(by_image) == len(by_both) == 2
    assert by_both[0]["id"] == by_text[0]["id"] and {n["id"] for n in by_both} & {n["id"] for n in by_image}
    [[image]] = generator.text_to_image(PROMPTS[:1], references=white, retrieved_documents=2, candidates=1)
    assert [image.retrieved_documents] == generator.retrieve(PROMPTS[:1], 2, white)


def test_tasks_that_a_model_was_not_trained_for_are_refused(generator):
    training = Training(frozenset({"text_to_image", "caption"}), masked_prompts=False)
    plain = Generator(replace(generator.parts, training=training))
    with pytest.raises(BadInputError, match=r"not tuned for edit \(it knows caption, text_to_image\)"):
        plain.edit([RED], ["x"])
    with pytest.raises(BadInputError, match="guidance and contrastive decoding need"):
        plain.text_to_image(["x"], guidance=2.0, candidates=1)
    assert plain.text_to_image(["x"], guidance=1.0, candidates=1) and plain.caption([RED])


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_other_precisions_find_almost_the_same_likelihoods(generator, tiny_models, precision):
    parts = {"model": paths.FINETUNED, "image_tokenizer": paths.IMAGE_TOKENIZER, "text_tokenizer": paths.TEXT_TOKENIZER}
    other = Generator.from_parts(
        **{name: tiny_models / path for name, path in parts.items()}, decoding=decoding(candidates=1), precision=precision
    )
    [expected], [found] = (g.score([RED], PROMPTS[:1]) for g in (generator, other))
    assert (found.text, found.image) == pytest.approx((expected.text, expected.image), rel=0.02)
    [[image]] = other.text_to_image(PROMPTS[:1], guidance=2.0)
    assert image.codes.min() >= 0 and image.codes.max() < 16 and image.image.size == (32, 32)
    assert other.caption([RED])[0].tokens is not None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: g.text_to_image(["  "]), BadInputError, "prompt 0 is empty"),
        (lambda g: g.text_to_image(["x"], top_p=1.5), BadInputError, "top_p"),
        (lambda g: g.text_to_image(["x"], num_images=0), BadInputError, "num_images"),
        (lambda g: g.text_to_image(["circle " * 300]), PromptTooLongError, "context of 160"),
        (lambda g: g.vqa([Image.new("RGB", (8, 8))], []), BadInputError, "1 images but 0 questions"),
        (lambda g: g.vqa([Image.new("RGB", (8, 8))], [" "]), BadInputError, "empty"),
        (lambda g: g.write([""]), BadInputError, "text 0 is empty"),
        (lambda g: g.text_to_image(["x"], no_such=1), BadInputError, "no_such"),
        (lambda g: g.text_to_image(["x"], tasks={"foo": {}}), BadInputError, "^tasks names foo; tasks are"),
        (lambda g: g.text_to_image(["x"], contrastive=2.0), BadInputError, "contrastive"),
        (lambda g: g.text_to_image(["x"], references=[]), BadInputError, "1 prompts but 0 references"),
        (lambda g: g.text_to_image(["x"], references=[RED], retrieved_documents=0), BadInputError, "retrieved_documents is 0; set it"),
        (lambda g: g.edit([RED], []), BadInputError, "1 images but 0 instructions"),
        (lambda g: g.reasoning([RED], ["Which?"], [["a"]]), BadInputError, "question 0 has 1 options; give at least two"),
        (lambda g: g.edit([RED], [" "]), BadInputError, "instruction 0 is empty"),
        (lambda g: g.infill([RED], [(0, 0, 33, 8)], ["x"]), BadInputError, r"the box, \(0, 0, 33, 8\).*inside the image of 32 x 32"),
        (lambda g: g.infill([RED], [(8, 8, 8, 9)], ["x"]), BadInputError, "not empty"),
        (lambda g: g.layout_to_image(["x"], [[]]), BadInputError, "layout 0 holds no object"),
        (lambda g: g.layout_to_image(["x"], [[("dog", (0, 0, 40, 4))]]), BadInputError, "a box of layout 0"),
        (lambda g: g.condition_to_image(["x"], [RED], ["fog"]), BadInputError, "unknown condition 'fog'; known are canny edge"),
        (lambda g: g.infill_text(["no blank"]), BadInputError, r"1 to 4 blanks \(___\), found 0"),
        (lambda g: g.infill_text(["___ " * 5]), BadInputError, "found 5"),
        (
            lambda g: g.infill_text(["circle " * 300 + "___"]),
            PromptTooLongError,
            "text 0, before blank 1, of .* do not fit",
        ),
        (lambda g: g.interleave([[]]), BadInputError, "at least one text or image"),
        (lambda g: g.score([RED], ["circle " * 300]), PromptTooLongError, "context of 160"),
        (lambda g: g.retrieve(None, 1), BadInputError, "by prompts, by images, or by both"),
        (
            lambda g: g.vqa([Image.new("RGB", (8, 8))], ["how many " * 200]),
            PromptTooLongError,
            "the question 'how many how.* do not fit",
        ),
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
        decoding=decoding(candidates=1),
    )
    assert np.asarray(plain.text_to_image(["x"])[0][0].image).shape == (32, 32, 3)
    with pytest.raises(BadInputError, match="rank"):
        plain.text_to_image(["x"], candidates=2)
    with pytest.raises(BadInputError, match="memory bank"):
        plain.text_to_image(["x"], retrieved_documents=1)


def test_a_directory_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a bundle"):
        Generator.from_bundle(tmp_path)
