"""Caption metrics as the COCO caption server computes them: BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D, in plain Python; higher is better.

The protocol is that of Chen et al. 2015 (arXiv 1504.00325). Conventions of its public code that affect scores are kept, and named below.
Every image has the same weight, whatever its number of references.
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
"""Words of the longest n-grams."""
BLEU = tuple(f"bleu_{n}" for n in range(1, LONGEST + 1))
BETA = 1.2
"""Weight of recall in ROUGE-L's F-measure."""
SIGMA = 6.0
"""Standard deviation of CIDEr-D's Gaussian length penalty, in words."""

# --- tokens ---------------------------------------------------------------------------------------------------------------------------

# The server's list of punctuation, which is removed after tokenization.
_PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}
_TOKEN = re.compile(
    r"""
      (?:[a-z]\.){2,}                            # u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|no|prof)\. # abbreviations keep their period
    | \d+(?:[.,:/]\d+)*(?:[^\W_]+)?              # 3  3.5  1,000  10:30  1/2  2nd
    | [^\W_]+(?:[-_&./@][^\W_]+)*                # word  black-and-white  t.v  a/b
    | '(?:s|m|d|ll|re|ve)(?!\w)                  # clitics, split off by _CONTRACTIONS
    | \.\.\.|--|``|''
    | \S
    """,
    re.VERBOSE,
)
# Typographic characters become ASCII; clitics and fused words become words of their own, as in the Penn Treebank.
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
    """Split a caption into words like the Penn Treebank tokenizer, in lower case and without punctuation.

    "The man's dog isn't here." -> the man 's dog is n't here. Hyphenated words are one word. Brackets are kept, as "-lrb-" and "-rrb-",
    because the server removes them in upper case only, after converting to lower case. Rare forms that the original tokenizer treats
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
    """Counts of all n-grams, n from 1 to 4."""
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


# --- BLEU -----------------------------------------------------------------------------------------------------------------------------


def bleu_counts(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """The counts of each caption from which BLEU is computed, so that captions can be resampled without counting again.

    Returns:
        float64 ``(captions, 10)``: clipped matches of n-grams, n from 1 to 4; all n-grams; the caption's length; and the length of the
        reference that is closest in length (the shorter of two equally close ones).
    """
    counts = np.zeros((len(hypotheses), 2 * LONGEST + 2))
    for row, hypothesis, group in zip(counts, hypotheses, references, strict=True):
        most: Ngrams = Counter()  # an n-gram matches at most as often as the reference that has it most often
        for reference in group:
            most |= ngrams(reference)
        for gram, count in ngrams(hypothesis).items():
            row[len(gram) - 1] += min(count, most[gram])
        row[LONGEST : 2 * LONGEST] = [max(0, len(hypothesis) - n) for n in range(LONGEST)]
        row[-2:] = len(hypothesis), min((abs(len(reference) - len(hypothesis)), len(reference)) for reference in group)[1]
    return counts


def bleu_of(counts: np.ndarray) -> list[float]:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002) of a corpus from its :func:`bleu_counts`, 0 to 1.

    BLEU-n is the geometric mean of the clipped precisions of 1- to n-grams over the whole corpus, times the brevity penalty
    ``exp(1 - r / c)`` if the captions (length c) are shorter than the references (length r). As in the public code, 1e-15 and 1e-9 keep
    numerators and denominators from being zero.
    """
    sums = counts.sum(0)
    correct, guessed, length, reference_length = sums[:LONGEST], sums[LONGEST : 2 * LONGEST], sums[-2], sums[-1]
    # The n-th root of the product of the first n precisions, for n from 1 to 4.
    precision = np.cumprod((correct + 1e-15) / (guessed + 1e-9)) ** (1 / np.arange(1, LONGEST + 1))
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    return [float(value) for value in precision * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)]


# --- ROUGE-L --------------------------------------------------------------------------------------------------------------------------


def _common_subsequence(a: Words, b: Words) -> int:
    """Length of the longest common subsequence, by dynamic programming over one row."""
    row = [0] * (len(b) + 1)
    for word in a:
        previous = 0
        for j, other in enumerate(b, start=1):
            previous, row[j] = row[j], previous + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(hypothesis: Words, references: Sequence[Words]) -> float:
    """ROUGE-L (Lin 2004) of one caption, 0 to 1: the F-measure of precision and recall of the longest common subsequence, beta 1.2.

    As in the public code, the best precision and the best recall over the references are combined, even if they are of different ones.
    """
    common = [_common_subsequence(hypothesis, reference) for reference in references]
    precision = max(common) / max(len(hypothesis), 1)
    recall = max(c / max(len(reference), 1) for c, reference in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


# --- CIDEr ----------------------------------------------------------------------------------------------------------------------------


def _weigh(counts: Ngrams, frequency: Ngrams, images: int) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
    """TF-IDF weights by n-gram length, with their norms; and the caption's length, which the public code counts in bigrams.

    Args:
        frequency: images that have the n-gram in at least one reference.
        images: all images.
    """
    vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
    length = 0
    for gram, count in counts.items():
        vectors[len(gram) - 1][gram] = count * (math.log(images) - math.log(max(1, frequency[gram])))
        length += count if len(gram) == 2 else 0
    return vectors, [math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors], length


def cider(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each caption (Vedantam et al. 2015), 0 to 10.

    The cosine similarity of clipped TF-IDF vectors of n-grams times a Gaussian length penalty, averaged over references and n from 1 to 4,
    times 10. Document frequencies are those of ``references``; a corpus of a single image scores 0, as every IDF is then 0.
    """
    images = len(references)
    counted = [[ngrams(reference) for reference in group] for group in references]
    frequency: Ngrams = Counter(gram for group in counted for gram in set().union(*group))
    scores = []
    # CIDEr-D = 10 / |references| / 4 * sum over references and n of exp(-(l_h - l_r)^2 / 2 sigma^2) * min(h_n, r_n) . r_n / |h_n| |r_n|
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


# --- corpus ---------------------------------------------------------------------------------------------------------------------------


def score(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenized: bool = False) -> dict[str, float]:
    """Corpus scores ``bleu_1`` to ``bleu_4`` and ``rouge_l``, 0 to 1, and ``cider``, 0 to 10. Papers print all of them times 100.

    Args:
        hypotheses: image id -> caption.
        references: image id -> its human captions.
        tokenized: captions and references are already words separated by spaces.

    Raises:
        ValueError: if the two have different images, there are none, or an image's references are a text or an empty list.
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
    """``rouge_l`` and ``cider`` of each caption, in the order of ``references``. Their means are the corpus scores."""
    candidates, targets = split(hypotheses, references, tokenized)
    return {
        "rouge_l": [rouge_l(c, group) for c, group in zip(candidates, targets, strict=True)],
        "cider": cider(candidates, targets),
    }


def split(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenized: bool) -> tuple[list[Words], list[list[Words]]]:
    """Captions and their references as words, in the order of ``references``."""
    words = str.split if tokenized else tokenize
    candidates = [words(hypotheses[key]) for key in references]
    return candidates, [[words(reference) for reference in group] for group in references.values()]
