"""Instruction-tuning templates: what a sample looks like, and that the prompt at inference is the sample's beginning."""

import itertools
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests_support import OBJECTIVE, make_documents

from cm3leon.config.schema import SFTConfig
from cm3leon.data import task_samples
from cm3leon.data.epochs import Weights
from cm3leon.data.sequences import PretrainingSamples, sample_rng
from cm3leon.data.task_samples import TaskSamples, bounded_shares
from cm3leon.data.tokens import Document, TokenStore, write_tokens
from cm3leon.generation.prompts import answer_prompt, image_prompt, infill_prompt, likelihood_pair
from cm3leon.sequence.grammar import EOS, EOSS, UNKNOWN, Vocabulary, check_grammar, split_tail
from cm3leon.sequence.tasks import (
    BREAK,
    TASKS,
    available,
    box_in_square,
    condition_key,
    lay_out,
    layout_text,
    reasoning_fields,
    split_template,
)
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.stages.text_tokenizer import texts
from cm3leon.utils.errors import UserError

TOKENIZER = TextTokenizer.train(["Question: What color is the circle? Answer: red."] * 3, 300)
VOCABULARY = Vocabulary(text_size=TOKENIZER.size, image_size=50, sentinels=8, tokens_per_image=16)
ROW = {
    "captions": ["a red circle"],
    "long_caption": "There is a red circle. It is red.",
    "questions": [{"question": "What color is the circle?", "answers": ["red"]}],
    "text_in_image": None,
}


def test_templates_are_those_of_the_paper():
    assert TASKS["vqa"].templates[0] == "Question: {question} Answer: {answer}. <break> {image}"
    asked = TASKS["vqa"].templates[0].split(BREAK)[0]
    assert split_template(asked, {"question": "Why?", "answer": "so"}) == ("Question: Why? Answer:", " so", ".")
    assert split_template("{caption}", {"caption": "a {curly} circle"}) == ("a {curly} circle", "", "")


def test_a_task_is_available_where_its_column_is_filled():
    assert available(ROW) == ["text_to_image", "caption", "long_caption", "vqa"]
    assert available({**ROW, "instruction": "x", "edited_from": None, "objects": [1], "conditions": [1], "reasoning": [1]}) == [
        "text_to_image", "layout_to_image", "condition_to_image", "caption", "long_caption", "vqa", "reasoning"
    ]  # fmt: skip
    assert available({"captions": ["x"], "long_caption": None, "questions": np.array([]), "text_in_image": "A"}) == [
        "text_to_image",
        "write",
        "caption",
    ]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    def make(tasks, change=None, **options):
        directory = tmp_path_factory.mktemp("tokens")
        write_tokens(directory, "train", make_documents(40), 16, 100)
        store = TokenStore(directory)
        records = {name: {"id": name, **ROW, **(change(row) if change else {})} for row, name in enumerate(store.ids)}
        documents = PretrainingSamples(store, store, {}, VOCABULARY, OBJECTIVE, [1.0], 200, 0)
        depth = [Document(condition_key(document.id, "depth"), document.codes ^ 1, []) for document in make_documents(40)]
        write_tokens(directory, "conditions-train", depth, 16, 100)
        conditions = TokenStore(directory, ["conditions-train"])
        return TaskSamples(
            documents,
            records,
            TOKENIZER,
            SFTConfig(
                **{
                    "tasks": tasks,
                    "answer_weight": 4.0,
                    "input_weight": 1.0,
                    "questions_per_sample": 1,
                    "edit_weight": 1.0,
                    "infill_share": 0.0,
                    **options,
                }
            ),
            conditions,
        )

    return make


PROBLEM = {
    "question": "Is it red?", "context": "Look.", "options": ["yes", "no"], "answer": "yes", "explanation": "The circle is red."
}  # fmt: skip
ANSWERS = {
    "caption": {"answer": "a red circle"},
    "long_caption": {"answer": ROW["long_caption"]},
    "vqa": {"question": "What color is the circle?", "answer": "red"},
    "reasoning": {
        **reasoning_fields("Is it red?", ["yes", "no"], "Look."), "answer": "yes", "explained": "The circle is red. So the answer is yes."
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "template"), [(n, t) for n, task in TASKS.items() if not task.generates_image for t in task.templates])
def test_inference_prompt_is_the_samples_beginning(samples, name, template):
    sampled = samples({name: 1.0}, lambda row: {"reasoning": [PROBLEM]}, answer_weight=5.0)
    values, codes = ANSWERS[name], sampled.pretraining.store[3].codes
    prompt = answer_prompt(template, values, codes, VOCABULARY, TOKENIZER)
    wanted = values["explained" if "{explained}" in template else "answer"]
    seen = []
    for masked, weights in ((s.masked, s.weights) for n in range(1200) if (s := sampled(*divmod(n, 40))).documents == (f"{4:016x}",)):
        check_grammar(masked.tokens, VOCABULARY)
        if masked.tokens[: len(prompt)].tolist() == prompt.tokens.tolist():
            answer = masked.tokens[len(prompt) : -2]
            assert masked.tokens[-2:].tolist() == [EOSS, EOS]
            assert TOKENIZER.decode(answer - VOCABULARY.text_start).strip() == wanted
            assert (weights[len(prompt) - 1 : -1] == 5).all() and weights[: len(prompt) - 1].max() == 1 and weights[-1] == 1
            seen.append(masked)
    assert seen, "no sample used this template"


def change(row):
    """The even rows are edits of the row before them."""
    return {
        "width": 64, "height": 32, "text_in_image": "A",
        "objects": [{"label": "red circle", "box": [16, 0, 32, 16]}, {"label": "outside", "box": [0, 0, 10, 10]}],
        "conditions": [{"kind": "depth", "image": ""}, {"kind": "fog", "image": ""}],
        "instruction": f"edit {row}" if row % 2 else None, "edited_from": f"{row:016x}" if row % 2 else None,
    }  # fmt: skip


DRAWN = {
    "text_to_image": [{"caption": "a red circle"}],
    "write": [{"text": "A"}],
    "layout_to_image": [{"caption": "a red circle", "layout": "red circle at (0, 0) -> (128, 128)"}],
    "condition_to_image": [{"caption": "a red circle", "kind": "depth"}],
    "edit": [{"instruction": "edit 3"}],
}


@pytest.mark.parametrize("name", DRAWN)
def test_an_image_sample_is_the_prompt_of_one_of_its_guidance_streams_and_the_image(samples, name):
    """Training samples equal what the generator lays out, with and without dropped segments, and what reranking scores."""
    sampled = samples({name: 1.0}, change, conditioning_dropout=0.5)
    task, store = TASKS[name], sampled.pretraining.store
    others = {"source": store[2].codes, "condition": store[3].codes ^ 1}
    query, _ = lay_out(task.templates[0], DRAWN[name], others, VOCABULARY, TOKENIZER)
    streams = [image_prompt(query, [], VOCABULARY, frozenset(dropped)).tokens for dropped in ((), *task.cfg_dropout)]
    wholes = [[*stream, *VOCABULARY.image(store[3].codes), EOS] for stream in streams[:1]]
    for dropped in task.cfg_dropout:
        before, read = likelihood_pair(query, store[3].codes, dropped, VOCABULARY)
        wholes.append([*before.tokens, *read.tokens, EOS])
        start, joint = likelihood_pair(query, store[3].codes, dropped, VOCABULARY, joint=True)
        image = VOCABULARY.image(store[3].codes).tolist()
        assert [*start.tokens, *joint.tokens, EOS] == wholes[-1] and joint.tokens[: len(image)].tolist() == image
        assert before.tokens[: len(streams[len(wholes) - 1])].tolist() == streams[len(wholes) - 1].tolist()
    found = [sampled(epoch, number) for epoch in range(12) for number in range(len(sampled))]
    own = [masked.tokens.tolist() for masked, _, documents, _ in found if documents[-1] == store.ids[3]]
    assert all(tokens in wholes for tokens in own) and all(whole in own for whole in wholes)
    for masked, *_ in found:
        check_grammar(masked.tokens, VOCABULARY)


def test_a_sample_needs_its_other_image(samples):
    assert samples({"edit": 1.0, "text_to_image": 1.0}, lambda row: change(row) | {"edited_from": "f" * 16}).counts == {"text_to_image": 40}
    outside = [{"label": "outside", "box": [0, 0, 10, 10]}]  # the sides of a wide image are cut away
    wide = samples({"layout_to_image": 1.0, "caption": 1.0}, lambda row: change(row) | {"width": 64, "height": 32, "objects": outside})
    assert wide.counts == {"caption": 40}
    fog = [{"kind": "fog", "image": ""}]
    assert samples({"condition_to_image": 1.0, "caption": 1.0}, lambda row: change(row) | {"conditions": fog}).counts == {"caption": 40}


def test_a_layout_is_written_in_the_coordinates_of_the_center_crop():
    assert box_in_square([16, 0, 48, 32], 64, 32) == (0, 0, 1, 1)
    assert box_in_square([0, 0, 40, 16], 64, 32) == (0, 0, 0.75, 0.5)
    assert box_in_square([0, 0, 30, 16], 64, 32) is None  # its center is cut away


def test_a_layout_lists_objects_as_they_are_generated_whatever_their_order():
    objects = [("ring", (0.5, 0.0, 1.0, 0.5)), ("cross", (0.0, 0.0, 0.5, 0.5)), ("square", (0.0, 0.5, 0.5, 1.0))]
    for order in itertools.permutations(objects):
        assert re.findall(r"[a-z]+(?= at)", layout_text(order)) == ["cross", "ring", "square"]


QUESTIONS = [{"question": f"What color is number {n}?", "answers": [f"red {n}"]} for n in range(6)]


@pytest.mark.parametrize(("context", "most"), [(160, 4), (100, 3)])
def test_a_sample_asks_several_questions_and_answers_each_after_the_image(samples, context, most):
    sampled = samples({"vqa": 1.0}, lambda row: {"questions": QUESTIONS}, questions_per_sample=4, answer_weight=5.0, input_weight=0.5)
    object.__setattr__(sampled.pretraining, "context", context)
    counts: Counter[int] = Counter()
    for epoch in range(40):
        masked, weights, *_ = sampled(epoch, 0)
        assert len(masked.tokens) <= context
        check_grammar(masked.tokens, VOCABULARY)
        body, tail = split_tail(masked.tokens[1:-1], VOCABULARY)
        counts[len(tail)] += 1
        asked = [TOKENIZER.decode(body[VOCABULARY.is_text(body)] - VOCABULARY.text_start)]
        for _, span in tail:
            answer = TOKENIZER.decode(span - VOCABULARY.text_start).strip()
            assert f"number {answer.removeprefix('red ')}?" in asked[0]
        answers = len(masked.tokens) - 2 - len(body)  # each with its mask before it and its end behind it
        assert weights[-1 - answers : -1].tolist() == [5.0] * answers
        assert set(weights[: -1 - answers]) == {0.0, 0.5}  # a mask in the body is no target
    assert sorted(counts) == list(range(1, most + 1))


def test_image_samples_are_prompt_then_image_and_some_drop_the_caption(samples):
    sampled = samples({"text_to_image": 1.0}, conditioning_dropout=0.3)
    query = [("text", VOCABULARY.text(TOKENIZER.encode("a red circle")))]
    prompt, unconditional = (image_prompt(query, [], VOCABULARY, masked).tokens for masked in (frozenset(), frozenset({0})))
    plain = dropped = 0
    for epoch in range(10):
        for row in range(40):
            masked, *_ = sampled(epoch, row)
            plain += masked.tokens[: len(prompt)].tolist() == prompt.tolist()
            dropped += masked.tokens[: len(unconditional)].tolist() == unconditional.tolist()
    assert plain + dropped == 400
    assert 0.2 < dropped / 400 < 0.4


def test_tokens_before_the_generated_image_have_the_input_weight(samples):
    for task in ("text_to_image", "condition_to_image", "edit"):
        sampled = samples({task: 1.0}, change, conditioning_dropout=0.5, input_weight=0.25)
        for number in range(len(sampled)):
            masked, weights, documents, _ = sampled(0, number)
            image = VOCABULARY.image(sampled.pretraining.store.by_id(documents[-1]).codes)
            tokens = " ".join(map(str, masked.tokens))
            first = tokens[: tokens.rindex(" " + " ".join(map(str, image)))].count(" ") + 1
            assert set(weights[:first]) <= {0.0, 0.25} and set(weights[first:]) == {1.0}
            assert np.array_equal(weights > 0, masked.is_target)


def test_the_cm3_objective_masks_spans_of_instruction_and_image(samples):
    sampled = samples({"edit": 1.0}, change, conditioning_dropout=0.0, mean_masks=1.0, input_weight=0.25)
    plain = samples({"edit": 1.0}, change, conditioning_dropout=0.0, input_weight=0.25)
    found = [sampled(epoch, number) for epoch in range(10) for number in range(len(sampled))]
    masked_images = 0
    for masked, weights, *_ in found:
        check_grammar(masked.tokens, VOCABULARY)
        assert len(masked.tokens) <= sampled.pretraining.context
        assert np.array_equal(weights > 0, masked.is_target)
        image = masked.body.segments[-1]
        masked_images += any(start < image.stop and stop > image.start for start, stop in masked.spans)
        if masked.spans:
            assert set(weights[-1 - sum(2 + stop - start for start, stop in masked.spans) :]) == {1.0}  # what was moved to the end
    assert 0.3 < np.mean([not masked.spans for masked, *_ in found]) < 0.6  # exp(-1) and the spans that overlapped
    assert masked_images > 0
    assert not any(plain(0, number).masked.spans for number in range(len(plain)))


def test_the_least_context_of_the_parameters_has_room_for_every_masked_region(samples):
    sampled = samples({"text_to_image": 1.0}, infill_share=1.0, conditioning_dropout=0.25)
    least = 16 + 3 + 3 * (3 * 4 // 4)  # as cm3leon/config/schema.py checks

    def draw(context):
        short = replace(sampled, pretraining=replace(sampled.pretraining, context=context))
        return [len(short(epoch, number).masked.tokens) for epoch in range(10) for number in range(40)]

    assert max(draw(least)) == least
    with pytest.raises(UserError, match=r"needs 18 tokens without its text, and 17 are allowed: raise pretrain.model.context by 1"):
        draw(least - 1)


def test_samples_with_a_masked_region_begin_as_the_streams_of_inpainting_do(samples):
    sampled = samples({"text_to_image": 1.0}, infill_share=0.5, conditioning_dropout=0.25, input_weight=0.25)
    caption = VOCABULARY.text(TOKENIZER.encode("a red circle"))
    counts: Counter[int] = Counter()
    for epoch in range(20):
        for number in range(40):
            masked, weights, documents, _ = sampled(epoch, number)
            check_grammar(masked.tokens, VOCABULARY)
            if masked.kind != "spans":
                continue
            image, codes = masked.body.segments[-1], sampled.pretraining.store.by_id(documents[-1]).codes
            region = np.zeros(len(codes), dtype=bool)
            for start, stop in masked.spans:
                region[start - image.start : stop - image.start] = True
            streams = [infill_prompt(text, codes, region, VOCABULARY) for text in (caption, caption[:0])]
            [chosen] = [n for n, (stream, _) in enumerate(streams) if masked.tokens[: len(stream)].tolist() == stream.tokens.tolist()]
            counts[chosen] += 1
            stream, continuation = streams[chosen]
            image_positions = [*stream.image_positions, *continuation.image_positions]
            assert masked.image_positions[:-2].tolist() == image_positions and masked.tokens[-2:].tolist() == [EOSS, EOS]
            unknown = continuation.tokens == UNKNOWN
            assert masked.tokens[len(stream) : -2][unknown].tolist() == VOCABULARY.image(codes)[region].tolist()
            assert masked.tokens[len(stream) : -2][~unknown].tolist() == continuation.tokens[~unknown].tolist()
            assert set(weights[len(stream) - 1 :]) == {1.0} and np.array_equal(weights > 0, masked.is_target)
    assert 320 < counts.total() < 480 and 0.15 < counts[1] / counts.total() < 0.35


def test_codes_that_an_edit_changes_weigh_more(samples):
    sampled = samples({"edit": 1.0}, change, conditioning_dropout=0.0, input_weight=0.25, edit_weight=4.0)
    changed = 0
    for number in range(len(sampled)):
        masked, weights, *_ = sampled(0, number)
        image = masked.body.segments[-1]
        before, after = masked.body.segments[1], slice(image.start, image.stop)
        differs = masked.tokens[before.start : before.stop] != masked.tokens[after]
        assert np.array_equal(weights[after], np.where(differs, 4.0, 1.0)) and weights[image.stop] == 1.0
        assert set(weights[: image.start]) == {0.25}
        changed += differs.sum()
    assert 0 < changed < len(sampled) * VOCABULARY.tokens_per_image


def test_the_mix_follows_its_weights(samples):
    sampled = samples({"text_to_image": 3.0, "caption": 1.0}, conditioning_dropout=0.0)
    masked = sum(bool(sampled(epoch, row)[0].spans) for epoch in range(20) for row in range(40))
    assert masked == 200


def test_the_mix_stays_within_its_bounds():
    counts = {"a": 700, "b": 200, "c": 100}
    assert bounded_shares(counts, {"a": 1, "b": 1, "c": 1}, 0, 100) == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert bounded_shares(counts, {"a": 1, "b": 1, "c": 8}, 0.3, 3) == pytest.approx({"a": 0.35, "b": 0.35, "c": 0.3})
    assert bounded_shares(counts, {"a": 1, "b": 900, "c": 1}, 0.3, 3)["b"] == pytest.approx(0.6)
    assert bounded_shares(counts, {"a": 1, "b": 1, "c": 1}, 1, 1) == pytest.approx({"a": 0.7, "b": 0.2, "c": 0.1})


def test_every_document_of_a_task_comes_before_one_comes_again(samples):
    sampled = samples({"edit": 1.0, "text_to_image": 1.0}, change, conditioning_dropout=0.0)
    assert len(sampled) == 40 and sampled.counts == {"text_to_image": 40, "edit": 20}
    edits = []
    for epoch in range(3):
        for number in range(40):
            sample = sampled(epoch, number)
            edits += [sample.documents[-1]] if len(sample.masked.body.segments) == 4 else []
    assert len(edits) == 60 and all(
        sorted(edits[start : start + 20]) == sorted(sampled.pretraining.store.ids[1::2]) for start in (0, 20, 40)
    )


def test_a_pass_of_a_task_has_a_document_as_often_as_its_weight_says(samples):
    plain = samples({"caption": 1.0, "vqa": 1.0})
    ids = plain.pretraining.store.ids
    weights = Weights.of_documents(ids, {name: 3.0 if row % 2 else 0.5 for row, name in enumerate(ids)}, 0)
    weighted = replace(plain, weights=weights)
    assert len(plain) == 40 and len(weighted) == 20 * 3.0 + 20 * 0.5
    found = [weighted(*divmod(number, 70)) for number in range(20 * 70)]
    counts = Counter(sample.documents[0] for sample in found)
    assert all(abs(counts[name] - 20 * weight) <= 5 for name, weight in zip(ids, weights.values, strict=True))
    ones = replace(plain, weights=Weights.of_documents(ids, dict.fromkeys(ids, 1.0), 0))
    for number in range(120):
        one, other = plain(*divmod(number, 40)), ones(*divmod(number, 40))
        assert one.masked.tokens.tolist() == other.masked.tokens.tolist() and one.documents == other.documents


def test_a_document_is_sampled_anew_each_time_also_by_a_task_with_several_passes_an_epoch(samples, monkeypatch):
    few = samples({"text_to_image": 1.0, "vqa": 1.0}, lambda row: {} if row % 8 == 1 else {"questions": []}, upsampling=4.0)
    drawn: list[tuple[int, ...]] = []

    def recorded(seed: int, *of_sample: Any) -> np.random.Generator:
        drawn.append((seed, *of_sample))
        return sample_rng(seed, *of_sample)

    monkeypatch.setattr(task_samples, "sample_rng", recorded)
    for epoch in range(3):
        for number in range(len(few)):
            few(epoch, number)
    assert len(few.rows["vqa"]) < len(few) * few.shares["vqa"], "the task has several passes in an epoch"
    assert len(drawn) == len(set(drawn)) == 3 * len(few)


def test_documents_without_a_task_are_no_samples(samples):
    sampled = samples({"vqa": 1.0}, lambda row: {} if row % 4 == 1 else {"questions": []})
    assert len(sampled) == sampled.counts["vqa"] == 10
    assert {sampled(0, row).documents[0] for row in range(10)} == set(sampled.pretraining.store.ids[1::4])


def test_no_document_with_a_task_is_an_error(samples):
    with pytest.raises(UserError, match=r"none of 40 documents .*\(vqa needs questions\)"):
        samples({"vqa": 1.0, "caption": 0.0}, lambda row: {"questions": []})


def test_the_text_tokenizer_learns_the_templates_words_and_no_field_names():
    learnt = list(texts(pd.DataFrame(columns=["captions", "long_caption", "questions"])))
    assert "Edit first image following the instruction" in learnt
    assert {"Question:", " Answer:", " The answer is", "Describe the given picture."} <= set(learnt)
    assert not any("{" in text or "}" in text or "<break>" in text for text in learnt)
