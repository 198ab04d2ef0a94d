"""Instruction-tuning templates: what a sample looks like, and that the prompt at inference is the sample's beginning."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from tests_support import make_documents

from cm3leon.config import ObjectiveConfig, SFTConfig, UserError
from cm3leon.data.sequences import PretrainingSamples
from cm3leon.data.task_samples import TaskSamples
from cm3leon.data.tokens import TokenStore, write_tokens
from cm3leon.documents import EOS, EOSS, Vocabulary, check_grammar, split_tail
from cm3leon.generation.prompts import answer_prompt, image_prompt
from cm3leon.stages.text_tokenizer import texts
from cm3leon.tasks import TASKS, available, split_template
from cm3leon.tokenizers.text import TextTokenizer

TOKENIZER = TextTokenizer.train(["Question: What color is the circle? Answer: red."] * 3, 300)
VOCABULARY = Vocabulary(text_size=TOKENIZER.size, image_size=50, sentinels=8, tokens_per_image=16)
ROW = {
    "captions": ["a red circle"],
    "long_caption": "There is a red circle. It is red.",
    "questions": [{"question": "What color is the circle?", "answers": ["red"]}],
    "text_in_image": None,
}


def test_templates_are_those_of_the_paper():
    assert TASKS["vqa"].templates[0] == "Question: {question} Answer: {answer}."
    assert split_template(TASKS["vqa"].templates[0], {"question": "Why?", "answer": "so"}) == ("Question: Why? Answer:", " so", ".")
    assert split_template("{caption}", {"caption": "a {curly} circle"}) == ("a {curly} circle", "", "")


def test_a_task_is_available_where_its_column_is_filled():
    assert available(ROW) == ["text_to_image", "caption", "long_caption", "vqa"]
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
        manifest = pd.DataFrame([{"id": name, **ROW, **(change(row) if change else {})} for row, name in enumerate(store.ids)])
        documents = PretrainingSamples(store, store, {}, VOCABULARY, ObjectiveConfig(), [1.0], 160, 0)
        return TaskSamples(documents, manifest, TOKENIZER, SFTConfig(tasks=tasks, **options))

    return make


@pytest.mark.parametrize(("name", "template"), [(n, t) for n, task in TASKS.items() if not task.draws for t in task.templates])
def test_inference_prompt_is_the_samples_beginning(samples, monkeypatch, name, template):
    drawn = samples({name: 1.0}, answer_weight=5.0)
    values = {
        "question": "What color is the circle?",
        "answer": {"vqa": "red", "caption": ROW["captions"][0]}.get(name, ROW["long_caption"]),
    }
    codes = drawn.documents.store[3].codes
    prompt = answer_prompt(template, values, codes, VOCABULARY, TOKENIZER)
    seen = []
    for epoch in range(30):
        masked, weights, _ = drawn(epoch, 3)
        check_grammar(masked.tokens, VOCABULARY)
        if masked.tokens[: len(prompt)].tolist() == prompt.tokens.tolist():
            answer = masked.tokens[len(prompt) : -2]
            assert masked.tokens[-2:].tolist() == [EOSS, EOS]
            assert TOKENIZER.decode(answer - VOCABULARY.text_start).strip() == values["answer"]
            assert (weights[len(prompt) - 1 : -1] == 5).all() and weights[: len(prompt) - 1].max() == 1 and weights[-1] == 1
            seen.append(epoch)
    assert seen, "no sample used this template"


QUESTIONS = [{"question": f"What color is number {n}?", "answers": [f"red {n}"]} for n in range(6)]


@pytest.mark.parametrize(("context", "most"), [(160, 4), (100, 3)])
def test_a_sample_asks_several_questions_and_answers_each_behind_the_image(samples, context, most):
    drawn = samples({"vqa": 1.0}, lambda row: {"questions": QUESTIONS}, questions_per_sample=4, answer_weight=5.0, input_weight=0.5)
    object.__setattr__(drawn.documents, "context", context)
    counts = Counter()
    for epoch in range(40):
        masked, weights, _ = drawn(epoch, 0)
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


def test_drawing_samples_are_prompt_then_image_and_some_drop_the_caption(samples):
    drawn = samples({"text_to_image": 1.0}, caption_drop=0.3)
    query = [("text", VOCABULARY.text(TOKENIZER.encode("a red circle")))]
    prompt, unconditional = (image_prompt(query, [], VOCABULARY, masked).tokens for masked in (frozenset(), frozenset({0})))
    plain = dropped = 0
    for epoch in range(10):
        for row in range(40):
            masked, *_ = drawn(epoch, row)
            plain += masked.tokens[: len(prompt)].tolist() == prompt.tolist()
            dropped += masked.tokens[: len(unconditional)].tolist() == unconditional.tolist()
    assert plain + dropped == 400
    assert 0.2 < dropped / 400 < 0.4


def test_the_mix_follows_its_weights(samples):
    drawn = samples({"text_to_image": 3.0, "caption": 1.0}, caption_drop=0.0)
    masked = sum(bool(drawn(epoch, row)[0].spans) for epoch in range(20) for row in range(40))
    assert abs(masked / 800 - 0.25) < 0.06


def test_documents_without_a_task_are_no_samples(samples):
    drawn = samples({"vqa": 1.0}, lambda row: {} if row % 4 == 1 else {"questions": []})
    assert len(drawn) == drawn.counts()["vqa"] == 10
    codes = [drawn.documents.store[row].codes for row in range(1, 40, 4)]
    for row in range(len(drawn)):
        masked, *_ = drawn(0, row)
        assert (VOCABULARY.image(codes[row]) == masked.tokens[VOCABULARY.is_image(masked.tokens)]).all()


def test_no_document_with_a_task_is_an_error(samples):
    with pytest.raises(UserError, match=r"none of 40 documents .*\(vqa needs questions\)"):
        samples({"vqa": 1.0, "caption": 0.0}, lambda row: {"questions": []})


def test_the_text_tokenizer_learns_the_templates_words_and_no_field_names():
    learnt = list(texts(pd.DataFrame(columns=["captions", "long_caption", "questions"])))
    assert {"Question:", " Answer:", " The answer is", "Describe the given picture."} <= set(learnt)
    assert not any("{" in text or "}" in text for text in learnt)
