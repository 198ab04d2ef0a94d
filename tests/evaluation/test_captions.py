"""Caption metrics against slow implementations written from the definitions, and cases computed by hand."""

import math
import random
from itertools import combinations

import numpy as np
import pytest

from cm3leon.evaluation import captions
from cm3leon.evaluation.captions import score, tokenize

WORDS = ["a", "red", "blue", "circle", "square", "on", "the", "left", "of", "white", "small"]


def corpus(seed: int, images: int = 8) -> tuple[dict[str, str], dict[str, list[str]]]:
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))

    return {str(i): sentence() for i in range(images)}, {str(i): [sentence() for _ in range(rng.randint(1, 4))] for i in range(images)}


def grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def slow_bleu(hypotheses: dict[str, str], references: dict[str, list[str]], n: int) -> float:
    product, length, closest = 1.0, 0, 0
    for order in range(1, n + 1):
        correct = guessed = 0
        for key, hypothesis in hypotheses.items():
            found = grams(hypothesis.split(), order)
            guessed += len(found)
            for gram in set(found):
                correct += min(found.count(gram), max(grams(r.split(), order).count(gram) for r in references[key]))
        product *= (correct + 1e-15) / (guessed + 1e-9)
    for key, hypothesis in hypotheses.items():
        own = len(hypothesis.split())
        length += own
        closest += min((len(r.split()) for r in references[key]), key=lambda size: (abs(size - own), size))
    return product ** (1 / n) * min(1.0, math.exp(1 - closest / length))


def slow_cider(hypotheses: dict[str, str], references: dict[str, list[str]]) -> float:
    def vector(sentence: str, n: int) -> dict[tuple[str, ...], float]:
        found = grams(sentence.split(), n)
        result = {}
        for gram in found:
            containing = sum(any(gram in grams(r.split(), n) for r in group) for group in references.values())
            result[gram] = found.count(gram) * math.log(len(references) / max(1, containing))
        return result

    values = []
    for key, hypothesis in hypotheses.items():
        per_n = []
        for n in range(1, 5):
            total = 0.0
            for reference in references[key]:
                h, r = vector(hypothesis, n), vector(reference, n)
                norm = math.sqrt(sum(v * v for v in h.values())) * math.sqrt(sum(v * v for v in r.values()))
                dot = sum(min(h[g], r[g]) * r[g] for g in h if g in r)
                # the public code takes the number of bigrams for the length
                difference = max(0, len(hypothesis.split()) - 1) - max(0, len(reference.split()) - 1)
                total += (dot / norm if norm else 0.0) * math.exp(-(difference**2) / (2 * 36))
            per_n.append(total / len(references[key]))
        values.append(10 * np.mean(per_n))
    return float(np.mean(values))


def slow_common(a: list[str], b: list[str]) -> int:
    for size in range(min(len(a), len(b)), 0, -1):
        kept = {tuple(c) for c in combinations(a, size)}
        if any(tuple(c) in kept for c in combinations(b, size)):
            return size
    return 0


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_the_definitions(seed: int) -> None:
    hypotheses, references = corpus(seed)
    found = score(hypotheses, references, tokenized=True)
    for n in range(1, 5):
        assert found[f"bleu_{n}"] == pytest.approx(slow_bleu(hypotheses, references, n), rel=1e-6, abs=1e-12)
    assert found["cider"] == pytest.approx(slow_cider(hypotheses, references), rel=1e-9)
    expected = []
    for key, hypothesis in hypotheses.items():
        words = hypothesis.split()
        common = [(slow_common(words, r.split()), len(r.split())) for r in references[key]]
        p, r = max(c for c, _ in common) / len(words), max(c / size for c, size in common)
        expected.append(0.0 if p == 0 else (1 + 1.44) * p * r / (r + 1.44 * p))
    assert found["rouge_l"] == pytest.approx(np.mean(expected), rel=1e-9)


def test_scores_computed_by_hand() -> None:
    # 3 of 4 words and 1 of 3 bigrams right, as long as the reference; common subsequence of 3 words
    found = score({"x": "a red round circle"}, {"x": ["a blue round circle"]})
    assert found["bleu_1"] == pytest.approx(3 / 4)
    assert found["bleu_2"] == pytest.approx(math.sqrt(3 / 4 * 1 / 3))
    assert found["rouge_l"] == pytest.approx(3 / 4)
    assert found["cider"] == 0  # one image: every inverse document frequency is 0


def test_captions_equal_to_a_reference_have_the_highest_scores() -> None:
    texts = {"x": "a red circle on white ground", "y": "two small blue squares over there"}
    found = score(texts, {key: [text] for key, text in texts.items()})
    assert found["cider"] == pytest.approx(10)
    for name in ("bleu_1", "bleu_4", "rouge_l"):
        assert found[name] == pytest.approx(1)


def test_short_captions_get_the_brevity_penalty() -> None:
    found = score({"x": "a red circle"}, {"x": ["a red circle on white"]})
    assert found["bleu_1"] == pytest.approx(math.exp(1 - 5 / 3))


def test_of_two_equally_close_references_the_shorter_sets_the_length() -> None:
    """All four words match; the brevity penalty is 1 against three words, and would be less against five."""
    assert captions.bleu_of(captions.bleu_counts([["a"] * 4], [[["a"] * 3, ["a"] * 5]]))[0] == pytest.approx(1)


def test_repeated_words_are_clipped() -> None:
    assert score({"x": "red red red"}, {"x": ["red circle there"]})["bleu_1"] == pytest.approx(1 / 3)


def test_order_of_images_does_not_matter() -> None:
    hypotheses, references = corpus(3)
    assert score(hypotheses, references) == pytest.approx(score(dict(reversed(hypotheses.items())), references))


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("The man's dog isn't here.", "the man 's dog is n't here"),
        ("A black-and-white cat, sitting; really!", "a black-and-white cat sitting really"),
        ('He said "hello" ...', "he said hello"),
        ("We cannot go - don't ask?", "we can not go do n't ask"),
        ("3.5 of 1,000 at 10:30", "3.5 of 1,000 at 10:30"),
        ("Two dogs (brown) & $5", "two dogs -lrb- brown -rrb- & $ 5"),
        ("Line\nbreak  and   spaces", "line break and spaces"),
        ("they’re über-cool", "they 're über-cool"),
        ("the dogs' bowls", "the dogs bowls"),
        ("", ""),
    ],
)
def test_tokenize(caption: str, words: str) -> None:
    assert tokenize(caption) == words.split()


def test_punctuation_and_case_do_not_matter() -> None:
    assert score({"x": "A red circle!"}, {"x": ["a red circle."]})["bleu_1"] == pytest.approx(1)


def test_missing_captions_and_references_are_an_error() -> None:
    with pytest.raises(ValueError, match="1 without caption"):
        score({}, {"x": ["a"]})
    with pytest.raises(ValueError, match="1 without reference"):
        score({"x": "a"}, {})
    with pytest.raises(ValueError, match="no captions"):
        score({}, {})
    with pytest.raises(ValueError, match="no reference"):
        score({"x": "a"}, {"x": []})


def test_an_empty_caption_scores_zero() -> None:
    found = score({"x": "", "y": "a red dog"}, {"x": ["a red circle"], "y": ["a red dog"]})
    assert 0 < found["rouge_l"] <= 0.5
    assert np.isfinite(list(found.values())).all()


def test_agrees_with_the_public_code() -> None:
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    hypotheses, references = corpus(7)
    found, listed = score(hypotheses, references, tokenized=True), {key: [text] for key, text in hypotheses.items()}
    expected = bleu.Bleu(4).compute_score(references, listed, verbose=0)[0]
    assert [found[f"bleu_{n}"] for n in range(1, 5)] == pytest.approx(expected, rel=1e-6)
    assert found["cider"] == pytest.approx(cider.Cider().compute_score(references, listed)[0])
    assert found["rouge_l"] == pytest.approx(rouge.Rouge().compute_score(references, listed)[0])
