"""CM3 masking: properties over many random sequences."""

import math

import numpy as np
import pytest

from cm3leon.sequence.cm3 import apply_spans, fit, kind_of, mask, region_spans, sample_region, sample_segment, sample_spans
from cm3leon.sequence.grammar import BREAK, EOS, EOSS, Vocabulary, build_body, check_grammar, restore, split_tail

VOCABULARY = Vocabulary(text_size=50, image_size=20, sentinels=16, tokens_per_image=16)


def random_body(rng, documents=None):
    built = []
    for _ in range(documents or int(rng.integers(1, 4))):
        text = VOCABULARY.text(rng.integers(50, size=int(rng.integers(0, 12))))
        built.append([("text", text), ("image", VOCABULARY.image(rng.integers(20, size=16)))])
    return build_body(built)


def test_masking_is_undone_exactly_and_respects_the_grammar():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        body = random_body(rng)
        masked = mask(body, VOCABULARY, rng, mean_masks=2.0, segment_rate=0.2)
        check_grammar(masked.tokens, VOCABULARY)
        source, tail = split_tail(masked.tokens[1:-1], VOCABULARY)
        assert np.array_equal(restore(source, tail), body.tokens[1:])
        assert len(masked.tokens) == len(body.tokens) + 1 + 3 * len(masked.spans)


def test_no_span_crosses_a_break_or_another_span():
    rng = np.random.default_rng(1)
    for _ in range(3000):
        body = random_body(rng)
        spans = sample_spans(body, 3.0, 16, rng)
        for start, stop in spans:
            assert any(s.start <= start < stop <= s.stop for s in body.segments)
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


def test_share_of_unmasked_sequences_is_as_poisson_predicts():
    rng = np.random.default_rng(2)
    body = random_body(rng, documents=2)
    count = 5000
    unmasked = sum(not mask(body, VOCABULARY, rng, mean_masks=1.0).spans for _ in range(count)) / count
    expected = math.exp(-1)
    assert abs(unmasked - expected) < 0.05  # a few spans fall on breaks and are not drawn


def test_sentinels_in_the_body_are_no_targets_and_everything_else_is():
    rng = np.random.default_rng(3)
    for _ in range(500):
        masked = mask(random_body(rng), VOCABULARY, rng, mean_masks=2.0)
        first_tail = len(masked.tokens) - 1 - sum(stop - start + 2 for start, stop in masked.spans)
        in_body = VOCABULARY.is_sentinel(masked.tokens) & (np.arange(len(masked.tokens)) < first_tail)
        assert np.array_equal(masked.is_target, ~in_body)


@pytest.mark.parametrize(("share", "modality"), [(1.0, "text"), (0.0, "image")])
def test_segment_masking_takes_a_whole_segment_of_the_query(share, modality):
    rng = np.random.default_rng(4)
    for _ in range(200):
        body = build_body([[("text", VOCABULARY.text([1, 2])), ("image", VOCABULARY.image(range(16)))] for _ in range(2)])
        masked = mask(body, VOCABULARY, rng, segment_rate=1.0, text_share=share)
        [span] = masked.spans
        segment = next(s for s in body.segments if (s.start, s.stop) == span)
        assert (segment.document, segment.modality) == (1, modality)


def test_masks_cross_breaks_only_where_they_may():
    rng, crossed = np.random.default_rng(6), {True: 0, False: 0}
    for allowed in crossed:
        for _ in range(300):
            body = random_body(rng)
            masked = mask(body, VOCABULARY, rng, mean_masks=2.0, across_breaks=allowed)
            crossed[allowed] += any(BREAK in body.tokens[start:stop] for start, stop in masked.spans)
            inside, tail = split_tail(masked.tokens[1:-1], VOCABULARY)
            assert np.array_equal(restore(inside, tail), body.tokens[1:])
    assert crossed[True] > 100 and crossed[False] == 0


def test_image_tokens_keep_their_image_positions_when_moved():
    rng = np.random.default_rng(7)
    for _ in range(500):
        body = random_body(rng)
        assert np.array_equal(body.image_positions, VOCABULARY.image_positions(body.tokens))
        masked = mask(body, VOCABULARY, rng, mean_masks=3.0)
        image, mark = VOCABULARY.is_image(masked.tokens), VOCABULARY.is_sentinel(masked.tokens)
        assert np.all(masked.image_positions[image] > 0) and not masked.image_positions[~image & ~mark].any()
        before, after = masked.image_positions[:-1][image[1:]], masked.image_positions[1:][image[1:]]
        assert np.array_equal(before + 1, after)  # behind a mask too
        pairs = sorted(zip(masked.tokens[image], masked.image_positions[image], strict=True))
        assert pairs == sorted(zip(body.tokens[body.image_positions > 0], body.image_positions[body.image_positions > 0], strict=True))


def test_masked_caption_gives_the_captioning_prompt_and_the_guidance_prompt():
    body = build_body([[("text", VOCABULARY.text([1, 2, 3])), ("image", VOCABULARY.image(range(16)))]])
    segment = sample_segment(body, 1.0, np.random.default_rng(0))
    tokens = apply_spans(body, [(segment.start, segment.stop)], VOCABULARY).tokens.tolist()
    sentinel = VOCABULARY.sentinel(0)
    image = VOCABULARY.image(range(16)).tolist()
    assert tokens == [EOS, sentinel, 2, *image, sentinel, *VOCABULARY.text([1, 2, 3]).tolist(), EOSS, EOS]


def test_a_long_sequence_loses_source_tokens_never_a_target():
    rng = np.random.default_rng(5)
    cut = 0
    for _ in range(3000):
        body = random_body(rng)
        spans = sample_spans(body, 2.0, 16, rng)
        images = sum(s.length for s in body.segments if s.modality == "image" and s.document == body.segments[-1].document)
        longest = max(len(body.tokens) + 1 + 3 * len(spans) - int(rng.integers(0, 12)), images + 4)
        shorter, kept = fit(body, spans, longest)
        masked = apply_spans(shorter, kept, VOCABULARY)
        assert len(masked.tokens) <= longest
        check_grammar(masked.tokens, VOCABULARY)
        targets = [body.tokens[start:stop].tolist() for start, stop in spans[: len(kept)]]
        assert [shorter.tokens[start:stop].tolist() for start, stop in kept] == targets
        cut += len(shorter.tokens) < len(body.tokens) and len(kept) == len(spans) > 0
    assert cut > 300


def test_text_is_not_cut_where_a_retrieved_document_is_left_out_all_the_same():
    documents = [[("text", VOCABULARY.text([1, 2, 3])), ("image", VOCABULARY.image(range(16)))] for _ in range(2)]
    body = build_body(documents)
    query = body.segments[-2]
    shorter, [span] = fit(body, [(query.start, query.start + 1)], len(body.tokens) - 8)
    assert [s.length for s in shorter.segments] == [0, 0, 3, 16]  # the query is whole
    assert len(shorter.tokens) == 1 + 3 + 1 + 16
    assert shorter.tokens[span[0]] == body.tokens[query.start]


def test_a_full_sequence_with_one_span_holds_its_whole_target():
    body = build_body([[("text", VOCABULARY.text(range(30))), ("image", VOCABULARY.image(range(16)))]])
    for span in ((1, 31), (32, 48), (5, 12)):
        longest = len(body.tokens) + 1 if span != (1, 31) else len(body.tokens) + 4
        shorter, kept = fit(body, [span], longest)
        masked = apply_spans(shorter, kept, VOCABULARY)
        assert len(masked.tokens) <= longest
        _, [(_, target)] = split_tail(masked.tokens[1:-1], VOCABULARY)
        assert target.tolist() == body.tokens[slice(*span)].tolist()


def test_images_that_do_not_fit_are_an_error():
    body = build_body([[("text", VOCABULARY.text([1])), ("image", VOCABULARY.image(range(16)))]])
    with pytest.raises(ValueError, match="images alone"):
        fit(body, [(1, 2)], 15)


def test_the_kinds_of_masks_are_told_apart():
    rng = np.random.default_rng(8)
    body = random_body(rng, documents=2)
    while not body.segments[2].length:
        body = random_body(rng, documents=2)
    text, image = ((s.start, s.stop) for s in body.segments[2:])
    own_text = (body.segments[0].start, body.segments[0].start + 1)
    assert [kind_of(body, spans) for spans in ([], [text], [image], [text, image], [own_text])][:4] == [
        "plain",
        "caption",
        "image",
        "image",
    ]
    kinds = [mask(body, VOCABULARY, rng, mean_masks=1.0, segment_rate=0.3, text_share=0.5).kind for _ in range(3000)]
    shares = {kind: kinds.count(kind) / 3000 for kind in set(kinds)}
    assert abs(shares["caption"] - 0.15) < 0.03
    assert abs(shares["image"] - 0.15) < 0.03
    assert abs(shares["plain"] - 0.7 * math.exp(-1)) < 0.06


@pytest.mark.parametrize("length", [*range(2, 40), 100, 1000, 4096])
def test_every_length_fits_a_longest(length):
    rng = np.random.default_rng(length)
    for _ in range(20):
        text = VOCABULARY.text(rng.integers(50, size=max(length - 2, 0)))
        masked = mask(build_body([[("text", text)]]), VOCABULARY, rng, mean_masks=2.0, segment_rate=0.3, longest=length)
        assert len(masked.tokens) <= length
        check_grammar(masked.tokens, VOCABULARY)


def test_no_length_crashes():
    rng = np.random.default_rng(6)
    for length in [0, 1, 2, 3, 5, 30]:
        body = build_body([[("text", VOCABULARY.text(rng.integers(50, size=length)))]])
        for _ in range(50):
            mask(body, VOCABULARY, rng, mean_masks=3.0, segment_rate=0.0)


@pytest.mark.parametrize("side", [1, 2, 3, 8, 32])
def test_regions_are_boxes_of_a_quarter_to_three_quarters_of_the_sides(side: int) -> None:
    rng = np.random.default_rng(0)
    sizes = set()
    for _ in range(500):
        region = sample_region(side, rng).reshape(side, side)
        rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
        assert region[np.ix_(rows, columns)].all() and np.ptp(rows) == len(rows) - 1 and np.ptp(columns) == len(columns) - 1
        sizes |= {len(rows), len(columns)}
    assert (min(sizes), max(sizes)) == (max(1, side // 4), max(1, 3 * side // 4))


def test_the_spans_of_a_region_are_its_rows():
    region = np.zeros((4, 4), dtype=bool)
    region[1:, 1:3] = True
    assert region_spans(region.ravel(), 3) == [(5, 7), (9, 11), (13, 15)]
    assert region_spans(region.ravel(), 2) == [(5, 7), (9, 15)]
    assert region_spans(region.ravel(), 1) == [(5, 15)]
    assert region_spans(region[:, 1:3].ravel(), 3) == [(2, 8)]  # rows as wide as the image
