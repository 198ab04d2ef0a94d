"""CM3 masking: properties over many random sequences."""

import math

import numpy as np
import pytest

from cm3leon.documents import EOS, EOSS, Vocabulary, build_body, check_grammar, restore, split_tail
from cm3leon.objective import apply_spans, draw_segment, draw_spans, mask

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
        spans = draw_spans(body, 3.0, 16, rng)
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


def test_image_tokens_keep_their_places_when_moved():
    rng = np.random.default_rng(7)
    for _ in range(500):
        body = random_body(rng)
        assert np.array_equal(body.places, VOCABULARY.places(body.tokens))
        masked = mask(body, VOCABULARY, rng, mean_masks=3.0)
        assert np.array_equal(masked.places > 0, VOCABULARY.is_image(masked.tokens))
        pairs = sorted(zip(masked.tokens[masked.places > 0], masked.places[masked.places > 0], strict=True))
        assert pairs == sorted(zip(body.tokens[body.places > 0], body.places[body.places > 0], strict=True))


def test_masked_caption_gives_the_captioning_prompt_and_the_guidance_prompt():
    body = build_body([[("text", VOCABULARY.text([1, 2, 3])), ("image", VOCABULARY.image(range(16)))]])
    segment = draw_segment(body, 1.0, np.random.default_rng(0))
    tokens = apply_spans(body, [(segment.start, segment.stop)], VOCABULARY).tokens.tolist()
    sentinel = VOCABULARY.sentinel(0)
    image = VOCABULARY.image(range(16)).tolist()
    assert tokens == [EOS, sentinel, 2, *image, sentinel, *VOCABULARY.text([1, 2, 3]).tolist(), EOSS, EOS]


def test_spans_that_do_not_fit_are_left_out():
    rng = np.random.default_rng(5)
    for _ in range(300):
        body = random_body(rng)
        longest = len(body.tokens) + 1 + 3
        masked = mask(body, VOCABULARY, rng, mean_masks=4.0, longest=longest)
        assert len(masked.tokens) <= longest
        check_grammar(masked.tokens, VOCABULARY)


def test_no_length_crashes():
    rng = np.random.default_rng(6)
    for length in [0, 1, 2, 3, 5, 30]:
        body = build_body([[("text", VOCABULARY.text(rng.integers(50, size=length)))]])
        for _ in range(50):
            mask(body, VOCABULARY, rng, mean_masks=3.0, segment_rate=0.0)
