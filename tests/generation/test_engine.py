"""Decoding against a reference that recomputes everything for every token."""

import functools

import numpy as np
import pytest
import torch
from tests_support import decoder_spec
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import scaled_dot_product_attention

from cm3leon.config.schema import DecodingConfig
from cm3leon.generation import cache as caches
from cm3leon.generation import engine
from cm3leon.generation.cache import DecodingCache, read_prompts
from cm3leon.generation.checks import PromptTooLongError
from cm3leon.generation.engine import MAX_WINDOW, generate_images, generate_texts, log_likelihoods, shared_prefix
from cm3leon.generation.sampling import Sampler, at_temperature, sample, uniform_noise
from cm3leon.models.decoder import Decoder
from cm3leon.sequence.grammar import BREAK, EOS, EOSS, UNKNOWN, Prompt, Vocabulary

VOCABULARY = Vocabulary(text_size=40, image_size=20, sentinels=4, tokens_per_image=9)
CONTEXT = 128


def make(**options):
    torch.manual_seed(0)
    spec = decoder_spec(layers=2, width=32, heads=4, context=CONTEXT, init_std=0.5, position_std=0.3, **options)
    model = Decoder(spec, VOCABULARY)
    for block in model.blocks:
        torch.nn.init.normal_(block.attention.out.weight, std=0.3)
        torch.nn.init.normal_(block.down.weight, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make(image_positions=True, rope=True, previous_token=True)


def plain(tokens):
    return Prompt(np.asarray(tokens), VOCABULARY.image_positions(np.asarray(tokens)))


def prompt(length, seed=0, documents=0):
    rng = np.random.default_rng(seed)
    before: list[int] = []
    for _ in range(documents):
        before += [*VOCABULARY.text(rng.integers(40, size=7)), BREAK, *VOCABULARY.image(rng.integers(20, size=9)), BREAK]
    return plain([EOS, *before, *VOCABULARY.text(rng.integers(40, size=length)), BREAK])


UNCONDITIONAL = plain([EOS, VOCABULARY.sentinel(0), BREAK])


def region(*known):
    """The continuation that generates the second to the fifth code, and the seventh and eighth, the others at ``known`` given."""
    start, between = VOCABULARY.image_start, [EOSS, VOCABULARY.sentinel(1)]
    tokens = [*[start + n if n in known else UNKNOWN for n in (1, 2, 3, 4)], *between, UNKNOWN, UNKNOWN]
    return Prompt(np.array(tokens), np.array([2, 3, 4, 5, 0, 6, 7, 8]))


def sampler(**changes):
    return Sampler(DecodingConfig(**{"temperature": 1.0, "top_p": 0.9, "guidance": 1.0, **changes}))


@torch.no_grad()
def forward(model, tokens, image_positions):
    """Logits after the last token, without a cache."""
    hidden = model(torch.from_numpy(tokens)[None], torch.from_numpy(image_positions)[None])
    return model.logits(hidden)[0, -1]


@torch.no_grad()
def reference_image(model, streams, seed, image_sampler):
    """One candidate of one prompt."""
    noise = uniform_noise([seed], VOCABULARY.tokens_per_image)
    codes: list[int] = []
    for step in range(VOCABULARY.tokens_per_image):
        generated = np.array([c + VOCABULARY.image_start for c in codes], dtype=np.int64)
        image_positions = np.arange(1, step + 1)
        rows = [forward(model, np.append(p.tokens, generated), np.append(p.image_positions, image_positions)) for p in streams]
        logits = torch.stack(rows)[:, None, None, None, VOCABULARY.image_start : VOCABULARY.text_start]
        codes.append(int(sample(image_sampler.probabilities(logits, torch.tensor([[[step / 8]]])), noise[:, None, step, None])))
    return codes


def read_raggedly(cache, model, following_RE, rng, window=4):
    """Hidden states (R, E, D) after tokens that are read in windows, each row at its own speed, with wrong guesses."""
    rows, steps = following_RE.shape
    found = torch.empty(rows, steps, model.spec.width)
    done = torch.zeros(rows, dtype=torch.int64)
    while done.min() < steps:
        starts = done.clamp(max=steps - window)
        right = torch.from_numpy(rng.integers(1, window + 1, size=rows)).maximum(done - starts)
        columns = starts[:, None] + torch.arange(window)
        tokens, image_positions = following_RE.gather(1, columns), 1 + columns
        wrong = torch.arange(window) >= right[:, None]
        tokens[wrong] = VOCABULARY.image_start + torch.from_numpy(rng.integers(20, size=int(wrong.sum())))
        hidden = cache.advance(model, tokens, image_positions, starts)
        for row in range(rows):
            found[row, columns[row, : right[row]]] = hidden[row, : right[row]]
        done = starts + right
    return found


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"image_positions": True}, {"rope": True}, {"previous_token": True}])
@pytest.mark.parametrize("shared", [0, 40])
@pytest.mark.parametrize("long", [0, 1000], ids=["uncopied", "copied"])
def test_prefill_and_decoding_equal_the_full_pass(options, shared, long, monkeypatch):
    """Hidden states of prompts of different lengths and of three continuations of each, with a shared prefix or without."""
    monkeypatch.setattr(caches, "MIN_UNCOPIED_PROMPT", long)
    model, rng = make(**options), np.random.default_rng(0)
    lengths = [50, 41, 63]
    rows = [plain(np.append(EOS, VOCABULARY.text(rng.integers(40, size=length - 1)))) for length in lengths]
    if shared:
        rows[1].tokens[:shared] = rows[0].tokens[:shared]
    with torch.inference_mode():
        prompts, hidden = read_prompts(model, rows, [shared, shared, 0])
        cache = DecodingCache(prompts, 3, 9)
        following = torch.from_numpy(rng.integers(20, size=(9, 9)) + VOCABULARY.image_start)  # rows, steps
        found = read_raggedly(cache, model, following, rng)
        for group, row in enumerate(rows):
            for copy in range(3):
                tokens = torch.cat([torch.from_numpy(row.tokens), following[3 * group + copy]])[None]
                expected = model(tokens, torch.from_numpy(VOCABULARY.image_positions(tokens[0].numpy()))[None])[0]
                torch.testing.assert_close(hidden[group], expected[len(row) - 1], atol=2e-5, rtol=1e-4)
                torch.testing.assert_close(found[3 * group + copy], expected[len(row) :], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("long", [0, 1000], ids=["uncopied", "copied"])
@pytest.mark.parametrize("changes", [{}, {"guidance": 2.5}, {"guidance": 2.5, "guidance_schedule": "cosine"}, {"contrastive": 1.0}])
def test_images_equal_the_reference_in_any_batch(model, changes, long, monkeypatch):
    monkeypatch.setattr(caches, "MIN_UNCOPIED_PROMPT", long)
    prompts, image_sampler = [prompt(3, 1), prompt(11, 2, documents=3), prompt(1, 3)], sampler(**changes)
    streams = [[p, UNCONDITIONAL][: image_sampler.streams_needed(2)] for p in prompts]
    seeds = [[5, 6], [7, 8], [9, 10]]
    codes = generate_images(model, streams, seeds, image_sampler)
    assert codes.shape == (3, 2, 9) and codes.min() >= 0 and codes.max() < 20
    for own, own_seeds, found in zip(streams, seeds, codes, strict=True):
        assert found.tolist() == [reference_image(model, own, seed, image_sampler) for seed in own_seeds]


def test_only_what_follows_a_shared_prefix_is_read_under_a_mask(model, monkeypatch):
    """Flash attention takes none, and a mask of a long prompt by itself is large."""
    masks = []
    attend = scaled_dot_product_attention

    def seen(q, k, v, attn_mask=None, **options):
        masks.append(None if attn_mask is None else attn_mask.shape[-2:])
        return attend(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    monkeypatch.setattr(caches, "MIN_SHARED_PREFIX", 1)
    prompts = [prompt(3, 1, documents=2), prompt(9, 1, documents=2)]
    read_prompts(model, prompts, [0, 0])
    assert set(masks) == {None}
    masks.clear()
    read_prompts(model, prompts, [30, 30])
    assert masks == [None] * model.spec.layers + [(len(prompts[1]) - 30, len(prompts[1]))] * model.spec.layers


@pytest.mark.parametrize("spread", [1, 2, 4])
def test_attention_to_a_prompt_held_once_is_as_exact_in_bfloat16_as_pytorchs(spread):
    """Errors against float64, relative; the logits' standard deviation is ``spread``."""
    groups, copies, heads, length, size, steps = 2, 4, 4, 300, 64, 20
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, size, generator=generator).bfloat16()

    prompt = caches.PromptCache.__new__(caches.PromptCache)
    prompt.keys, prompt.values = spread * draw(1, groups, heads, length), draw(1, groups, heads, length)
    prompt.bias, prompt.lengths = torch.zeros(groups, 1, 1, length).bfloat16(), torch.full((groups,), length)
    prompt.last = torch.zeros(groups, 1, dtype=torch.int64)
    cache = DecodingCache(prompt, copies, steps)
    keys, values = (held[0].repeat_interleave(copies, 0) for held in (prompt.keys, prompt.values))
    for start in range(0, steps, 4):
        rows = (groups * copies, heads, 4)
        query, key, value = draw(*rows), spread * draw(*rows), draw(*rows)
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        later = torch.ones(4, length + start + 4, dtype=torch.bool).triu(length + start + 1)
        exact = scaled_dot_product_attention(query.double(), keys.double(), values.double(), attn_mask=~later)
        cache.place(torch.full((groups * copies,), start), 4)
        found = cache.attend(0, query, key, value, size**-0.5)
        assert found.dtype == torch.bfloat16
        errors = [(output.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
                  for output in (found, scaled_dot_product_attention(query, keys, values, attn_mask=~later))]  # fmt: skip
        assert errors[0].max() < 0.01 and errors[0].max() < 2.5 * errors[1].max()


@pytest.mark.parametrize("long", [0, 1000], ids=["uncopied", "copied"])
def test_decoding_in_bfloat16_is_as_near_to_float32_as_one_pass_in_bfloat16(long, monkeypatch):
    """Hidden states, relative, of a whole model: decoding code by code adds less than half of what rounding costs anyway."""
    monkeypatch.setattr(caches, "MIN_UNCOPIED_PROMPT", long)
    model = make()
    tokens = torch.randint(4, model.vocabulary.size, (3, 60), generator=torch.Generator().manual_seed(0))
    image_positions = torch.zeros_like(tokens)

    def decoded():
        prompts = [Prompt(row[:40].numpy(), np.zeros(40, np.int64)) for row in tokens]
        prompt_cache, hidden = caches.read_prompts(model, prompts, [0] * 3)
        cache = caches.decoding_cache(model, prompt_cache, 1, 20)
        steps = [
            cache.advance(model, tokens[:, [at]], image_positions[:, [at]], torch.full((3,), at - 40))[:, 0].float() for at in range(40, 60)
        ]
        return torch.stack([hidden.float(), *steps], 1)

    with torch.inference_mode():
        exact = model(tokens, image_positions)[:, 39:]
        torch.testing.assert_close(decoded(), exact, rtol=1e-4, atol=1e-4)
        model.bfloat16()
        one_pass, by_code = (
            float((found - exact).norm() / exact.norm()) for found in (model(tokens, image_positions)[:, 39:].float(), decoded())
        )
    assert by_code < 0.05 and by_code < 1.5 * one_pass


@pytest.mark.slow
@pytest.mark.parametrize("long", [0, 1000], ids=["uncopied", "copied"])
def test_compiled_decoding_generates_the_same_images_and_texts(long, monkeypatch):
    """Over a multiple of the length that attention covers, so that two lengths are captured; kernels, which take minutes, are not made."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(caches, "_compiled_read", functools.cache(caches._compiled_read.__wrapped__))  # restored, nothing stays captured
    monkeypatch.setattr(caches, "MIN_UNCOPIED_PROMPT", long)
    monkeypatch.setattr(caches, "LENGTH_MULTIPLE", 6 if long == 0 else 38)
    monkeypatch.setattr(engine, "window_length", lambda width, rows, steps: 2)
    model, image_sampler = make(), sampler(guidance=2.5)
    streams = [[p, UNCONDITIONAL] for p in (prompt(3, 1), prompt(11, 2))]
    expected = generate_images(model, streams, [[5, 6], [7, 8]], image_sampler)
    options = {"temperature": 1.5, "top_p": 1.0, "max_tokens": 8}
    text = generate_texts(model, [prompt(4, 1), prompt(9, 2)], [1, 2], **options)
    model.compiled_decoding = True
    torch._dynamo.utils.counters.clear()
    assert np.array_equal(generate_images(model, streams, [[5, 6], [7, 8]], image_sampler), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 and not torch._dynamo.utils.counters["graph_break"]
    assert generate_texts(model, [prompt(4, 1), prompt(9, 2)], [1, 2], **options) == text


def test_three_streams_equal_the_reference(model):
    streams = [[prompt(12, 1, documents=2), prompt(5, 1, documents=2), prompt(2, 1, documents=2)]]
    image_sampler = sampler(guidance=4.0, image_guidance=1.5)
    [[found]] = generate_images(model, streams, [[3]], image_sampler)
    assert found.tolist() == reference_image(model, streams[0], 3, image_sampler)


def shapes_read(model, monkeypatch):
    """The shapes of what the decoder reads from now on."""
    given: list[tuple[int, ...]] = []
    forward_pass = model.forward

    def counted(tokens, *rest, **options):
        given.append(tuple(tokens.shape))
        return forward_pass(tokens, *rest, **options)

    monkeypatch.setattr(model, "forward", counted)
    return given


@pytest.mark.parametrize("long", [0, 1000], ids=["uncopied", "copied"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"guidance": 2.5, "guidance_schedule": "linear"}, {"guidance": 2.5, "contrastive": 0.5}, {"guidance": 4.0, "image_guidance": 1.5}],
)
def test_guessed_codes_equal_those_decoded_one_by_one(model, changes, long, monkeypatch):
    """Bit for bit, in fewer passes, whatever the window: 2 prompts of 2 candidates, of whole images and of regions."""
    monkeypatch.setattr(caches, "MIN_UNCOPIED_PROMPT", long)
    image_sampler = sampler(temperature=0.4, **changes)
    three = [prompt(12, 1, documents=2), prompt(5, 1, documents=2), UNCONDITIONAL]
    streams = [own[: 3 if "image_guidance" in changes else image_sampler.streams_needed(2)] for own in (three, three[1:] + three[:1])]
    given = shapes_read(model, monkeypatch)
    found, passes = {}, {}
    for window in (1, 2, 8):
        monkeypatch.setattr(engine, "window_length", lambda width, rows, steps, window=window: min(window, steps))
        given.clear()
        found[window] = [
            generate_images(model, streams, [[seed, seed + 1], [seed + 2, seed + 3]], image_sampler, continuation)
            for seed in range(3)
            for continuation in (None, region(), region(2, 3))
        ]
        passes[window] = len(given)
    for window in (2, 8):
        assert all(np.array_equal(one, other) for one, other in zip(found[1], found[window], strict=True))
    assert passes[1] > passes[2] > passes[8]


def test_known_tokens_take_one_pass(model, monkeypatch):
    """All are known but the first and the last code, which the one pass after the prompt's predicts."""
    given = shapes_read(model, monkeypatch)
    known = Prompt(np.array([UNKNOWN, *range(VOCABULARY.image_start, VOCABULARY.image_start + 7), UNKNOWN]), np.arange(1, 10))
    [[found]] = generate_images(model, [[prompt(4, 1)]], [[2]], sampler(), known)
    assert given == [(1, 6), (1, 8)] and len(found) == 2


def test_windows_are_short_where_many_rows_are_decoded():
    assert [engine.window_length(96, rows, 63) for rows in (1, 8, 16, 32, 33, 256)] == [8, 8, 4, 2, 1, 1]
    assert [engine.window_length(1024, rows, 63) for rows in (1, 6, 8, 16, 24, 25)] == [8, 8, 6, 3, 2, 1]
    assert engine.window_length(96, 1, 3) == 3


def test_processes_that_share_a_model_take_equally_many_passes(monkeypatch, tmp_path):
    """One code a pass where the model is sharded; processes that have one each read guesses."""
    model = make(image_positions=True, rope=True)
    given = shapes_read(model, monkeypatch)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        whole = generate_images(model, [[prompt(5)]], [[0]], sampler())
        assert {length for _, length in given[1:]} == {MAX_WINDOW}
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model(*torch.zeros(2, 1, 1, dtype=torch.int64))  # as in training, which gathers parameters outside of inference mode
        given.clear()
        assert np.array_equal(generate_images(model, [[prompt(5)]], [[0]], sampler()), whole)
        assert {length for _, length in given[1:]} == {1}
    finally:
        torch.distributed.destroy_process_group()


def test_documents_shared_by_all_streams_and_candidates_are_prefilled_once(model, monkeypatch):
    """Counted by what the decoder is given: the documents once, each stream's own tokens once, then each row's windows."""
    given = shapes_read(model, monkeypatch)
    body = prompt(6, 4, documents=3)
    masked = plain([*body.tokens[:-7], VOCABULARY.sentinel(0), BREAK])
    generate_images(model, [[body, masked]], [list(range(8))], sampler(guidance=3.0))
    shared = shared_prefix([body, masked])
    assert shared == len(body) - 7 >= caches.MIN_SHARED_PREFIX
    assert given[:2] == [(1, shared), (2, 7)] and len(given) <= 2 + 8 and set(given[2:]) == {(16, engine.window_length(32, 16, 8))}


def test_guidance_with_another_stream_changes_the_image(model):
    greedy = {"temperature": 0.0, "top_p": 1.0}
    plain_one = generate_images(model, [[prompt(5)]], [[0]], sampler(**greedy))
    guided = generate_images(model, [[prompt(5), UNCONDITIONAL]], [[0]], sampler(guidance=8.0, **greedy))
    same = generate_images(model, [[prompt(5), prompt(5)]], [[0]], sampler(guidance=8.0, **greedy))
    assert not np.array_equal(plain_one, guided)
    assert np.array_equal(plain_one, same)


def test_codes_are_generated_around_known_tokens(model):
    """Those of two rows of which one code is given are those of full passes over what is known and generated, with image positions."""
    start, continuation = prompt(4, 1), region(2)
    [[found]] = generate_images(model, [[start]], [[2]], sampler(), continuation)
    tokens, steps = continuation.tokens.copy(), np.flatnonzero(continuation.tokens == UNKNOWN)
    tokens[steps] = found + VOCABULARY.image_start
    assert len(found) == 5
    noise = uniform_noise([2], len(tokens))
    for step, code in zip(steps, found, strict=True):
        seen = np.append(start.tokens, tokens[:step]), np.append(start.image_positions, continuation.image_positions[:step])
        row = forward(model, *seen)[None, None, None, None, VOCABULARY.image_start : VOCABULARY.text_start]
        progress = torch.tensor([[[step / (len(tokens) - 1)]]])
        assert code == int(sample(sampler().probabilities(row, progress), noise[:, None, step, None]))


def test_texts_equal_the_reference(model):
    prompts = [prompt(4, 1).followed_by(VOCABULARY.sentinel(0)), prompt(9, 2).followed_by(VOCABULARY.sentinel(0))]
    texts = generate_texts(model, prompts, [0, 0], temperature=0.0, top_p=1.0, max_tokens=12, ends=(EOSS, BREAK))
    for row, start in enumerate(prompts):
        tokens, end = start.tokens, None
        expected: list[int] = []
        while len(expected) < 12 and end is None:
            logits = forward(model, tokens, VOCABULARY.image_positions(tokens))
            allowed = [EOSS, BREAK, *range(VOCABULARY.text_start, VOCABULARY.size)]
            best = allowed[int(logits[allowed].argmax())]
            if best in (EOSS, BREAK):
                end = best
            else:
                expected.append(best - VOCABULARY.text_start)
                tokens = np.append(tokens, best)
        assert texts[row] == (expected, end)


def test_texts_are_sampled_by_their_own_seed(model):
    options = {"temperature": 1.5, "top_p": 1.0, "max_tokens": 8}
    three = generate_texts(model, [prompt(4, 1), prompt(9, 2), prompt(4, 1)], [1, 2, 3], **options)
    assert [generate_texts(model, [p], [s], **options)[0] for p, s in ((prompt(4, 1), 1), (prompt(9, 2), 2), (prompt(4, 1), 3))] == three
    assert three[0] != three[2]


def test_likelihoods_equal_the_reference(model):
    prompts = [prompt(4, 1), prompt(9, 2), prompt(2, 3)]
    texts = [plain([*VOCABULARY.text(ids), EOSS]) for ids in ([7, 0, 39], [5], [1, 2])]
    for start, text, found in zip(prompts, texts, log_likelihoods(model, prompts, texts), strict=True):
        tokens, expected = start.tokens, []
        for token in text.tokens:
            logits = forward(model, tokens, VOCABULARY.image_positions(tokens))
            expected.append(logits.log_softmax(-1)[int(token)].item())
            tokens = np.append(tokens, token)
        assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_prompt_that_does_not_fit_in_the_context_is_an_error(model):
    with pytest.raises(PromptTooLongError, match="context of 128"):
        generate_images(model, [[prompt(122)]], [[0]], sampler())
    with pytest.raises(PromptTooLongError, match="context of 128"):
        log_likelihoods(model, [prompt(100)], [plain(VOCABULARY.text([1] * 60))])
    assert generate_images(model, [[prompt(117)]], [[0]], sampler()).shape == (1, 1, 9)


def test_temperature_zero_chooses_the_most_likely_token():
    assert at_temperature(torch.tensor([0.0, 2.0]), 0.0).tolist() == [0.0, 1.0]
