"""Caption metrics as the COCO caption server computes them: BLEU-1..4, ROUGE-L and CIDEr-D, in plain Python.

Chen et al. 2015 (arXiv 1504.00325) fix the protocol; the conventions of its public code that change the numbers are kept and named here.
Every image counts once, whatever its number of references.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

Words = list[str]
Ngrams = Counter[tuple[str, ...]]

LONGEST = 4
BLEU = tuple(f"bleu_{n}" for n in range(1, LONGEST + 1))
BETA = 1.2
SIGMA = 6.0

# --- tokens ---------------------------------------------------------------------------------------------------------------------------

_PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}
_TOKEN = re.compile(
    r"""
      (?:[a-z]\.){2,}                            # u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|no|prof)\. # abbreviations keep their period
    | \d+(?:[.,:/]\d+)*(?:[^\W_]+)?              # 3  3.5  1,000  10:30  1/2  2nd
    | [^\W_]+(?:[-_&./@][^\W_]+)*                # word  black-and-white  t.v  a/b
    | '(?:s|m|d|ll|re|ve)(?!\w)                  # what splitting off leaves
    | \.\.\.|--|``|''
    | \S
    """,
    re.VERBOSE,
)
_CONTRACTIONS = (
    (re.compile(r"[’‘]"), "'"),
    (re.compile(r"…"), " ... "),
    (re.compile(r"[–—]"), " -- "),
    (re.compile(r"(?<=[^\W_])n't(?!\w)"), " n't "),
    (re.compile(r"(?<=[^\W_])('(?:s|m|d|ll|re|ve))(?!\w)"), r" \1 "),
    (re.compile(r"\b(can)(not)\b"), r"\1 \2"),
    (re.compile(r"\b(gon|wan|got)(na|ta)\b"), r"\1 \2"),
)


def tokenize(caption: str) -> Words:
    """Words of a caption as the Penn Treebank tokenizer gives them, lower case, without punctuation.

    "The man's dog isn't here." -> the man 's dog is n't here. Hyphenated words stay whole. Brackets stay, as "-lrb-" and "-rrb-": the
    server's list of punctuation names them in upper case after everything was made lower case. Rare forms that the original treats
    specially (e-mail addresses, some abbreviations) may differ.
    """
    text = caption.lower().replace("\n", " ")
    for pattern, replacement in _CONTRACTIONS:
        text = pattern.sub(replacement, text)
    words: Words = []
    for chunk in text.split():
        words += ["n't"] if chunk == "n't" else _TOKEN.findall(chunk)
    return [_BRACKETS.get(word, word) for word in words if word not in _PUNCTUATION and word != '"']


def ngrams(words: Words) -> Ngrams:
    """Counts of all n-grams of one to four words."""
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


# --- BLEU -----------------------------------------------------------------------------------------------------------------------------


def bleu_counts(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """The counts that BLEU needs of each caption, ``(n, 10)``: clipped and all n-grams for n = 1 to 4, its length, and the length of the
    reference closest in length (the shorter of two equally close ones).
    """
    counts = np.zeros((len(hypotheses), 2 * LONGEST + 2))
    for row, hypothesis, group in zip(counts, hypotheses, references, strict=True):
        most: Ngrams = Counter()
        for reference in group:
            most |= ngrams(reference)
        for gram, count in ngrams(hypothesis).items():
            row[len(gram) - 1] += min(count, most[gram])
        row[LONGEST : 2 * LONGEST] = [max(0, len(hypothesis) - n) for n in range(LONGEST)]
        row[-2:] = len(hypothesis), min((abs(len(reference) - len(hypothesis)), len(reference)) for reference in group)[1]
    return counts


def bleu_of(counts: np.ndarray) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus from its :func:`bleu_counts`: clipped n-gram precision with brevity penalty.

    As in the caption server, 1e-15 is added to numerators and 1e-9 to denominators.
    """
    sums = counts.sum(0)
    correct, guessed, length, reference_length = sums[:LONGEST], sums[LONGEST : 2 * LONGEST], sums[-2], sums[-1]
    precision = np.cumprod((correct + 1e-15) / (guessed + 1e-9)) ** (1 / np.arange(1, LONGEST + 1))
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    return [float(value) for value in precision * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)]


# --- ROUGE-L --------------------------------------------------------------------------------------------------------------------------


def _common_subsequence(a: Words, b: Words) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        previous = 0
        for j, other in enumerate(b, start=1):
            previous, row[j] = row[j], previous + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(hypothesis: Words, references: Sequence[Words]) -> float:
    """ROUGE-L of one caption, F-measure with beta 1.2.

    The best precision and the best recall over the references are combined even where they come from different references.
    """
    common = [_common_subsequence(hypothesis, reference) for reference in references]
    precision = max(common) / max(len(hypothesis), 1)
    recall = max(c / max(len(reference), 1) for c, reference in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


# --- CIDEr ----------------------------------------------------------------------------------------------------------------------------


def _weigh(counts: Ngrams, frequency: Ngrams, images: int) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
    """TF-IDF vectors by n-gram length, their norms, and the length as CIDEr-D counts it, in bigrams."""
    vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
    length = 0
    for gram, count in counts.items():
        vectors[len(gram) - 1][gram] = count * (math.log(images) - math.log(max(1, frequency[gram])))
        length += count if len(gram) == 2 else 0
    return vectors, [math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors], length


def cider(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each caption (Vedantam et al. 2015): n to 4, sigma 6, counts clipped, document frequency from these references.

    Multiplied by 10 as in the public code, so the range is 0 to 10. A corpus of one image scores 0, because every inverse document
    frequency is 0.
    """
    images = len(references)
    counted = [[ngrams(reference) for reference in group] for group in references]
    frequency: Ngrams = Counter(gram for group in counted for gram in set().union(*group))
    scores = []
    for hypothesis, group in zip(hypotheses, counted, strict=True):
        vector_h, norm_h, length_h = _weigh(ngrams(hypothesis), frequency, images)
        total = 0.0
        for reference in group:
            vector_r, norm_r, length_r = _weigh(reference, frequency, images)
            penalty = math.exp(-((length_h - length_r) ** 2) / (2 * SIGMA**2))
            for n in range(LONGEST):
                dot = sum(min(value, vector_r[n].get(gram, 0.0)) * vector_r[n].get(gram, 0.0) for gram, value in vector_h[n].items())
                norm = norm_h[n] * norm_r[n]
                total += penalty * (dot / norm if norm else dot)
        scores.append(10 * total / LONGEST / len(group))
    return scores


# --- all ------------------------------------------------------------------------------------------------------------------------------


def score(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenized: bool = False) -> dict[str, float]:
    """Corpus scores ``bleu_1`` .. ``bleu_4``, ``rouge_l`` (0-1) and ``cider`` (0-10; papers print all of them times 100).

    Args:
        hypotheses: image id -> caption.
        references: image id -> its human captions.
        tokenized: the captions are tokens separated by spaces, to which :func:`tokenize` is not applied.

    Raises:
        ValueError: if the two do not name the same images, there are none, or an image's references are no list or an empty one.
    """
    if hypotheses.keys() != references.keys():
        missing, unknown = sorted(references.keys() - hypotheses.keys()), sorted(hypotheses.keys() - references.keys())
        raise ValueError(
            f"captions and references differ: {len(missing)} without caption {missing[:3]}, {len(unknown)} without reference {unknown[:3]}"
        )
    if not hypotheses:
        raise ValueError("no captions to score")
    empty = [key for key, group in references.items() if not group]
    if empty:
        raise ValueError(f"{len(empty)} images have no reference caption: {empty[:3]}")
    texts = [key for key, group in references.items() if isinstance(group, str)]
    if texts:
        raise ValueError(f"{len(texts)} images have a text instead of a list of reference captions: {texts[:3]}")
    means = {name: float(np.mean(values)) for name, values in per_image(hypotheses, references, tokenized).items()}
    return dict(zip(BLEU, bleu_of(bleu_counts(*split(hypotheses, references, tokenized))), strict=True)) | means


def per_image(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenized: bool = False) -> dict[str, list[float]]:
    """``rouge_l`` and ``cider`` of each caption, in the order of ``references``; their means are the corpus scores."""
    candidates, targets = split(hypotheses, references, tokenized)
    return {
        "rouge_l": [rouge_l(c, group) for c, group in zip(candidates, targets, strict=True)],
        "cider": cider(candidates, targets),
    }


def split(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenized: bool) -> tuple[list[Words], list[list[Words]]]:
    """The words of captions and of their references, in the order of ``references``."""
    words = str.split if tokenized else tokenize
    candidates = [words(hypotheses[key]) for key in references]
    return candidates, [[words(reference) for reference in group] for group in references.values()]
