"""The export for transformers: what it computes is what the decoder, the tokenizers and the generator compute."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from alone_support import run_alone
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests_support import decoder_spec, decoding

from cm3leon.generation.engine import generate_images, generate_texts
from cm3leon.generation.prompts import answer_prompt, image_prompt
from cm3leon.generation.sampling import Sampler
from cm3leon.models.decoder import Decoder, DecoderSpec
from cm3leon.models.pixels import to_channels_first, to_channels_last
from cm3leon.models.transformers_export import export
from cm3leon.models.transformers_export.export import ExportError, export_transformers
from cm3leon.models.vqgan import ImageTokenizer, ImageTokenizerSpec
from cm3leon.sequence.grammar import EOS, PAD, Prompt, Vocabulary, build_body, check_grammar
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.utils.torchvision_compat import make_importable

CAPTIONS = ["a red circle", "two green crosses above a blue ring", "a blue square"]
TEXT = TextTokenizer.train(CAPTIONS, 280)
PICTURES = ImageTokenizerSpec(
    image_size=12, patch=2, channels=8, multipliers=(1, 2), blocks=1, decoder_blocks=2, embedding_dim=4, codebook_size=20, encoder_kernel=1
)
VOCABULARY = Vocabulary(text_size=TEXT.size, image_size=20, sentinels=4, tokens_per_image=9, reserved=3)
ALL = {"qk_norm": True, "image_positions": True, "rope": True, "previous_token": True}
OPTIONS: list[dict[str, bool]] = [{}, *({name: True} for name in ALL), {"rope": True, "qk_norm": True}, ALL]


def make(seed: int = 0, **options: Any) -> Decoder:
    """A decoder with random weights everywhere: at initialization the output layers are zero and would hide the others."""
    torch.manual_seed(seed)
    model = Decoder(decoder_spec(2, 32, 2, 64, **options), VOCABULARY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def pictures() -> ImageTokenizer:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(PICTURES).eval()
    for parameter in tokenizer.parameters():  # residual branches start at zero
        torch.nn.init.normal_(parameter, std=0.3)
    return tokenizer


@pytest.fixture(scope="module")
def transformers() -> Any:
    make_importable()
    return pytest.importorskip("transformers")


@pytest.fixture
def load(transformers: Any, pictures: ImageTokenizer, tmp_path: Path) -> Any:
    """Export a decoder and read it with transformers' own code."""
    from cm3leon.models.transformers_export.modeling_cm3leon import Cm3leonForCausalLM

    def exported(model: Decoder, **options: Any) -> Any:
        export_transformers(model, pictures, TEXT, decoding(), tmp_path / "out")
        found, report = Cm3leonForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, **options)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return found

    return exported


def documents() -> torch.Tensor:
    """Sequences (3, 60) of five documents, texts of one to eight tokens and whole images, of which the last may be cut."""
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(3):
        texts = [VOCABULARY.text(rng.integers(TEXT.size, size=int(length))) for length in rng.integers(1, 9, 5)]
        body = build_body([[("text", text), ("image", VOCABULARY.image(rng.integers(20, size=9)))] for text in texts])
        rows.append(body.tokens[:60])
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def logits_of(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """The decoder's logits of whole sequences (B, T)."""
    image_positions = np.stack([VOCABULARY.image_positions(row) for row in tokens.numpy()])
    return model.logits(model(tokens, torch.from_numpy(image_positions)))


def prompts_of(captions: list[str]) -> list[Prompt]:
    return [image_prompt([("text", VOCABULARY.text(TEXT.encode(caption)))], [], VOCABULARY) for caption in captions]


def padded(prompts: list[Prompt]) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, as a tokenizer of transformers would."""
    longest = max(map(len, prompts))
    ids = np.stack([np.pad(prompt.tokens, (longest - len(prompt), 0), constant_values=PAD) for prompt in prompts])
    mask = np.stack([np.arange(longest) >= longest - len(prompt) for prompt in prompts])
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask).long()}


# --- the decoder -----------------------------------------------------------------------------------------------------


def test_every_option_of_the_decoder_is_tried() -> None:
    assert set(ALL) == {field.name for field in fields(DecoderSpec) if field.type == "bool"}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "paper")
@torch.no_grad()
def test_logits_are_the_decoders(options: dict[str, bool], load: Any) -> None:
    model, tokens = make(**options), documents()
    ours = logits_of(model, tokens)
    assert ours.std() > 0.3
    torch.testing.assert_close(load(model)(tokens).logits, ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, ALL], ids=["paper", "all"])
@torch.no_grad()
def test_tokens_read_in_parts_have_the_logits_of_one_pass(options: dict[str, bool], load: Any, transformers: Any) -> None:
    theirs, tokens = load(make(**options)), documents()
    whole, cache, parts, start = theirs(tokens).logits, transformers.DynamicCache(), [], 0
    for length in (1, 17, 1, 1, 30, 10):
        start += length
        inputs = theirs.prepare_inputs_for_generation(tokens[:, :start], cache)
        assert inputs["input_ids"].shape == (3, length)
        parts.append(theirs(**inputs).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_batch_padded_on_the_left_has_the_logits_of_its_rows(load: Any) -> None:
    model = make(**ALL)
    theirs, prompts = load(model), prompts_of(CAPTIONS)
    assert len({len(prompt) for prompt in prompts}) == 3
    for row, prompt in zip(theirs(**padded(prompts)).logits, prompts, strict=True):
        torch.testing.assert_close(row[-len(prompt) :], logits_of(model, torch.from_numpy(prompt.tokens)[None])[0], atol=1e-4, rtol=0)


def test_the_loss_is_next_token_cross_entropy(load: Any) -> None:
    model, tokens = make(**ALL), documents()
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.3, -100)
    theirs = load(model)
    found = theirs(tokens, labels=labels).loss
    expected = F.cross_entropy(logits_of(model, tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    found.backward()
    trained = {name for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in theirs.named_parameters() if not name.startswith("image_tokenizer.")}


def test_what_transformers_saves_and_loads_again_is_the_same(load: Any, tmp_path: Path) -> None:
    theirs = load(make(**ALL))
    theirs.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    again = type(theirs).from_pretrained(tmp_path / "again")
    assert again.lm_head.weight is again.tokens.weight
    assert torch.equal(again(documents()).logits, theirs(documents()).logits)


def test_half_precision_leaves_the_image_tokenizer_in_float32(load: Any) -> None:
    theirs = load(make(**ALL), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in theirs.image_tokenizer.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in theirs.blocks.parameters()} == {torch.bfloat16}
    tokens = theirs.generate(**padded(prompts_of(CAPTIONS)), do_sample=False, guidance_scale=2.0)
    assert theirs.decode_images(tokens[:, -9:]).shape == (3, 12, 12, 3)


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("options", [{}, ALL], ids=["paper", "all"])
def test_greedy_images_are_the_generators(options: dict[str, bool], guidance: float, load: Any) -> None:
    model, prompts = make(seed=3, **options), prompts_of(CAPTIONS)
    free = image_prompt([("text", np.zeros(0, dtype=np.int64))], [], VOCABULARY, {0})
    streams = [[prompt] if guidance == 1 else [prompt, free] for prompt in prompts]
    sampler = Sampler(decoding(temperature=0.0, top_p=1.0, guidance=guidance))
    ours = generate_images(model, streams, [[0]] * 3, sampler)[:, 0]
    assert len(np.unique(ours)) > 3
    theirs = load(model).generate(**padded(prompts), do_sample=False, guidance_scale=guidance)
    assert theirs[:, -9:].sub(VOCABULARY.image_start).tolist() == ours.tolist()


def test_each_row_may_have_a_negative_prompt_of_its_own(load: Any) -> None:
    model, prompts = make(seed=3, **ALL), prompts_of(CAPTIONS)
    others = [*prompts[1:], prompts[0]]
    sampler = Sampler(decoding(temperature=0.0, top_p=1.0, guidance=3.0))
    ours = generate_images(model, list(zip(prompts, others, strict=True)), [[0]] * 3, sampler)[:, 0]
    negative = {f"negative_prompt_{name.removeprefix('input_')}": value for name, value in padded(others).items()}
    theirs = load(model).generate(**padded(prompts), **negative, do_sample=False, guidance_scale=3.0)
    assert theirs[:, -9:].sub(VOCABULARY.image_start).tolist() == ours.tolist()


def test_greedy_answers_are_the_generators(load: Any, transformers: Any, tmp_path: Path) -> None:
    model, rng = make(seed=5, **ALL), np.random.default_rng(0)
    theirs = load(model)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    images = rng.integers(20, size=(4, 9))
    prompts = [answer_prompt("Describe. {answer} <break> {image}", {}, codes, VOCABULARY, TEXT) for codes in images]
    ours = generate_texts(model, prompts, [0] * 4, temperature=0.0, top_p=1.0, max_tokens=20)
    assert len({tuple(ids) for ids, _ in ours}) > 1
    for row, (ids, _) in zip(theirs.generate(**padded(prompts), do_sample=False, max_new_tokens=20), ours, strict=True):
        assert tokenizer.decode(row[len(prompts[0]) :], skip_special_tokens=True) == TEXT.decode(ids)


def test_what_is_generated_keeps_to_the_grammar(load: Any) -> None:
    theirs, prompts = load(make(**ALL)), prompts_of(CAPTIONS)
    torch.manual_seed(0)
    found = theirs.generate(**padded(prompts), temperature=5.0, num_return_sequences=8, max_new_tokens=30)
    finished = 0
    for row, prompt in zip(found.numpy(), np.repeat(np.arange(3), 8), strict=True):
        generated = row[-30:]
        assert VOCABULARY.is_image(generated[:9]).all()
        if (ends := np.flatnonzero(generated == EOS)).size:
            check_grammar(np.append(prompts[prompt].tokens, generated[: ends[0] + 1]), VOCABULARY)
            finished += 1
    assert finished > 4


def test_sampling_takes_the_models_own_settings(load: Any, tmp_path: Path) -> None:
    settings = json.loads(load(make()).generation_config.to_json_string())
    assert (settings["do_sample"], settings["temperature"], settings["top_p"], settings["top_k"]) == (True, 0.8, 0.9, 0)
    assert (settings["max_new_tokens"], settings["eos_token_id"]) == (9, [1, 3])


def test_beam_search_gives_whole_images(load: Any) -> None:
    found = load(make(**ALL)).generate(**padded(prompts_of(CAPTIONS)), do_sample=False, num_beams=3)
    assert VOCABULARY.is_image(found[:, -9:].numpy()).all()


# --- the tokenizers --------------------------------------------------------------------------------------------------


def test_images_are_encoded_and_decoded_as_by_the_image_tokenizer(load: Any, pictures: ImageTokenizer) -> None:
    theirs = load(make())
    pixels = torch.randint(256, (5, 12, 12, 3), dtype=torch.uint8)
    codes = pictures.encode(to_channels_first(pixels))
    assert len(codes.unique()) > 5
    tokens = theirs.encode_images(pixels)
    assert torch.equal(tokens, codes + VOCABULARY.image_start)
    ours = to_channels_last(pictures.decode(codes))
    assert ours.float().std() > 10
    assert (theirs.decode_images(tokens).int() - ours.int()).abs().max() <= 1  # a sum in another order may round another way


def test_the_tokenizer_knows_texts_and_special_tokens(load: Any, transformers: Any, tmp_path: Path) -> None:
    load(make())
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == VOCABULARY.size
    assert [VOCABULARY.role(number) for number in range(8)] == tokenizer.convert_ids_to_tokens(list(range(8)))
    for text in (*CAPTIONS, "Zwölf Boxkämpfer,  \n jagen 🦊 .", " a", "a "):
        assert tokenizer(text).input_ids == VOCABULARY.text(TEXT.encode(text)).tolist()
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    [prompt] = prompts_of(CAPTIONS[:1])
    assert tokenizer(f"<eos>{CAPTIONS[0]}<break>").input_ids == prompt.tokens.tolist()
    batch = tokenizer([f"<eos>{caption}<break>" for caption in CAPTIONS], padding=True, return_tensors="pt")
    assert {name: value.tolist() for name, value in batch.items()} == {k: v.tolist() for k, v in padded(prompts_of(CAPTIONS)).items()}
    # A text of somebody else stays text.
    found = tokenizer("a<break>", split_special_tokens=True).input_ids
    assert found == VOCABULARY.text(TEXT.encode("a<break>")).tolist()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_cannot_be_right_is_refused(load: Any, transformers: Any) -> None:
    theirs, tokens = load(make(**ALL)), documents()
    cache = theirs(tokens[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="need previous_ids and image_positions"):
        theirs(tokens[:, 5:6], past_key_values=cache)
    with pytest.raises(ValueError, match="65 tokens is longer than the context of 64"):
        theirs(torch.ones(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"attention mask must be \(3, 60\), .* found \(3, 5\)"):
        theirs(tokens, attention_mask=torch.ones(3, 5))
    prompts = padded(prompts_of(CAPTIONS))
    with pytest.raises(ValueError, match="static caches are not supported"):
        theirs.generate(**prompts, cache_implementation="static")
    with pytest.raises(ValueError, match="leave num_beams out"):
        theirs.generate(**prompts, guidance_scale=2.0, num_beams=3, do_sample=False)
    with pytest.raises(ValueError, match="pass guidance_scale to generate"):
        theirs.generate(**prompts, generation_config=transformers.GenerationConfig(guidance_scale=2.0, max_new_tokens=9))
    with pytest.raises(ValueError, match=r"expected whole images, \(B, 9\) image tokens"):
        theirs.decode_images(prompts["input_ids"][:, :9])
    with pytest.raises(ValueError, match=r"uint8 \(B, 12, 12, 3\), found torch.uint8 \(1, 24, 24, 3\)"):
        theirs.encode_images(torch.zeros(1, 24, 24, 3, dtype=torch.uint8))


def test_parts_that_do_not_belong_together_are_refused(pictures: ImageTokenizer, tmp_path: Path) -> None:
    other = Decoder(decoder_spec(1, 16, 2, 64), Vocabulary(TEXT.size, 21, 4, 9))
    with pytest.raises(ExportError, match="20 image codes and the decoder 21"):
        export_transformers(other, pictures, TEXT, decoding(), tmp_path / "out")
    with pytest.raises(ExportError, match=f"260 text tokens and the decoder {TEXT.size};"):
        export_transformers(make(), pictures, TextTokenizer.train(CAPTIONS, 260), decoding(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- by itself -------------------------------------------------------------------------------------------------------


def test_the_directory_holds_no_pickle_and_its_code_needs_nothing_else(pictures: ImageTokenizer, tmp_path: Path) -> None:
    export_transformers(make(**ALL), pictures, TEXT, decoding(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *export.MODULES, "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} and "lm_head.weight" not in file.keys()  # noqa: SIM118
    names = {name for module in export.MODULES for name in imports(tmp_path / module)}
    assert {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names} <= {
        "torch", "transformers", *(f".{module.removesuffix('.py')}" for module in export.MODULES),
    }  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    """The packages that a module imports, siblings with a dot before them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f".{node.module}" if node.level else str(node.module).partition(".")[0]


@pytest.mark.slow
def test_transformers_alone_loads_and_generates_the_same(pictures: ImageTokenizer, tmp_path: Path) -> None:
    model, prompts, tokens = make(seed=3, **ALL), prompts_of(CAPTIONS), documents()
    export_transformers(model, pictures, TEXT, decoding(), tmp_path / "out")
    save_file({"tokens": tokens}, tmp_path / "in.safetensors")
    code = f"""
import importlib.util
assert not any(importlib.util.find_spec(name) for name in ("cm3leon", "PIL", "torchvision", "mlflow"))
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("out", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
prompts = tokenizer([f"<eos>{{caption}}<break>" for caption in {CAPTIONS!r}], padding=True, return_tensors="pt")
images = model.generate(**prompts, do_sample=False)[:, -9:]
logits = model(load_file("in.safetensors")["tokens"]).logits.detach()
save_file({{"images": images.contiguous(), "pixels": model.decode_images(images), "logits": logits}}, "found.safetensors")
"""
    run_alone(code, ("torch", "transformers", "safetensors", "tokenizers"), tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    torch.testing.assert_close(found["logits"], logits_of(model, tokens), atol=1e-4, rtol=0)
    sampler = Sampler(decoding(temperature=0.0, top_p=1.0, guidance=1.0))
    ours = generate_images(model, [[prompt] for prompt in prompts], [[0]] * 3, sampler)[:, 0]
    assert found["images"].sub(VOCABULARY.image_start).tolist() == ours.tolist()
    assert (found["pixels"].int() - to_channels_last(pictures.decode(torch.from_numpy(ours))).int()).abs().max() <= 1
