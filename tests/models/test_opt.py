"""OPT checkpoints: the logits and greedy continuations of transformers, exact round trips, and errors for all that is not expressible."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import decoder_spec

from cm3leon.cli import app
from cm3leon.cli.options import CHAMPION
from cm3leon.models.decoder import Decoder
from cm3leon.models.opt import OPTFormatError, export_opt, import_opt
from cm3leon.sequence.grammar import EOS, PAD, Vocabulary
from cm3leon.utils.torchvision_compat import make_importable

VOCABULARY = Vocabulary(text_size=40, image_size=20, sentinels=4, tokens_per_image=9, reserved=3)
SHAPES = [(1, 8, 1, 16), (2, 32, 4, 48), (3, 24, 3, 33)]
TOKENS = "model.decoder.embed_tokens.weight"
FC1 = "model.decoder.layers.0.fc1.weight"


def make(layers: int = 2, width: int = 32, heads: int = 4, context: int = 48, seed: int = 0, **options: Any) -> Decoder:
    """A decoder with random weights everywhere: at initialization the output layers are zero and would hide the others."""
    torch.manual_seed(seed)
    model = Decoder(decoder_spec(layers, width, heads, context, **options), VOCABULARY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def same(first: Decoder, second: Decoder) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def transformers() -> Any:
    make_importable()
    return pytest.importorskip("transformers")


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    export_opt(make(), tmp_path / "opt")
    return tmp_path / "opt"


def change_config(directory: Path, **changes: Any) -> None:
    """Set keys of ``config.json``; None removes."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


# --- compared with transformers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_transformers_computes_the_same_logits(shape: tuple[int, int, int, int], tmp_path: Path, transformers: Any) -> None:
    model = make(*shape)
    export_opt(model, tmp_path)
    reference, report = transformers.OPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(VOCABULARY.size, (3, model.spec.context))
    tokens[0, 3] = PAD
    ours = model.logits(model(tokens, torch.zeros_like(tokens)))
    assert ours.std() > 0.3
    torch.testing.assert_close(ours, reference.eval()(tokens).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_transformers_gives_the_same_greedy_continuation(exported: Path, transformers: Any) -> None:
    model, reference = make(), transformers.OPTForCausalLM.from_pretrained(exported).eval()
    prompts = torch.randint(VOCABULARY.text_start, VOCABULARY.size, (8, 6))
    prompts[:, 0] = EOS
    continuations = []
    for prompt in prompts:
        tokens = prompt[None]
        while tokens.shape[1] < 26 and (tokens.shape[1] == 6 or tokens[0, -1] != EOS):
            last = model(tokens, torch.zeros_like(tokens))[:, -1]
            tokens = torch.cat([tokens, model.logits(last).argmax(-1, keepdim=True)], 1)
        found = reference.generate(prompt[None], attention_mask=torch.ones(1, 6), max_new_tokens=20, do_sample=False)
        assert found.tolist() == tokens.tolist()
        continuations.append(tuple(tokens[0, 6:].tolist()))
    assert len(set(continuations)) > 1 and len({token for tokens in continuations for token in tokens}) > 3


def test_generation_stops_at_eos(tmp_path: Path, transformers: Any) -> None:
    model = make()
    prompt = torch.tensor([[VOCABULARY.text_start, VOCABULARY.text_start + 1]])
    with torch.no_grad():
        model.tokens.weight[EOS] = 10 * model(prompt, torch.zeros_like(prompt))[0, -1]  # so that <eos> is by far the likeliest
    export_opt(model, tmp_path)
    reference = transformers.OPTForCausalLM.from_pretrained(tmp_path)
    found = reference.generate(prompt, attention_mask=torch.ones(1, 2), max_new_tokens=9, do_sample=False)
    assert found.tolist() == [[*prompt[0].tolist(), EOS]]


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_what_transformers_saves_is_read_exactly(size: str, exported: Path, tmp_path: Path, transformers: Any) -> None:
    transformers.OPTForCausalLM.from_pretrained(exported).save_pretrained(tmp_path / "saved", max_shard_size=size)
    shards = list((tmp_path / "saved").glob("*.safetensors"))
    assert len(shards) == 1 if size == "1GB" else len(shards) > 2
    again = import_opt(tmp_path / "saved")
    assert same(again, make()) and (again.spec, again.vocabulary) == (make().spec, VOCABULARY)


def test_a_model_made_by_transformers_is_read_with_a_vocabulary(tmp_path: Path, transformers: Any) -> None:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY.size, hidden_size=24, ffn_dim=96, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=30,
        enable_bias=False, layer_norm_elementwise_affine=False, init_std=0.3, pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.OPTForCausalLM(config).eval()
    reference.save_pretrained(tmp_path)
    with pytest.raises(OPTFormatError, match="give it with --vocabulary"):
        import_opt(tmp_path)
    model = import_opt(tmp_path, VOCABULARY)
    tokens = torch.randint(VOCABULARY.size, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(tokens, torch.zeros_like(tokens))), reference(tokens).logits, atol=1e-4, rtol=0)


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_is_exact(shape: tuple[int, int, int, int], tmp_path: Path) -> None:
    model = make(*shape, init_std=0.01, position_std=0.02)
    export_opt(model, tmp_path / "opt")
    assert {path.name for path in (tmp_path / "opt").iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    again = import_opt(tmp_path / "opt")
    assert (again.spec, again.vocabulary) == (model.spec, VOCABULARY)
    assert same(again, model) and not again.training
    again.save(tmp_path / "ours")
    assert same(Decoder.load(tmp_path / "ours"), model)


def test_half_precision_is_kept_in_the_file_and_read_as_float32(tmp_path: Path) -> None:
    model = make().to(torch.bfloat16)
    export_opt(model, tmp_path)
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert same(import_opt(tmp_path), model.float())


def test_a_saved_output_matrix_that_is_tied_is_ignored(exported: Path) -> None:
    change_weights(exported, lambda weights: weights.update({"lm_head.weight": weights[TOKENS].clone()}))
    assert same(import_opt(exported), make())


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "found", "needed"), [
    ({"image_positions": True}, "image_positions=true", "pretrain.model.image_positions=false"),
    ({"rope": True}, "rope=true", "pretrain.model.rope=false"),
    ({"previous_token": True}, "previous_token=true", "pretrain.model.previous_token=false"),
    ({"qk_norm": True}, "qk_norm=true", "pretrain.model.qk_norm=false"),
    ({"qk_norm": True, "rope": True}, "qk_norm=true, rope=true", "--set pretrain.model.qk_norm=false --set pretrain.model.rope=false"),
])  # fmt: skip
def test_options_that_opt_lacks_are_named(options: dict[str, bool], found: str, needed: str, tmp_path: Path) -> None:
    with pytest.raises(OPTFormatError) as caught:
        export_opt(make(**options), tmp_path / "opt")
    assert found in str(caught.value) and needed in str(caught.value)
    assert not (tmp_path / "opt").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "gpt2"}, 'model_type is "gpt2", needed is "opt"'),
    ({"architectures": ["OPTModel"]}, r'architectures is \["OPTModel"\]'),
    ({"enable_bias": True}, "enable_bias is true, needed is false"),
    ({"enable_bias": None}, "enable_bias is true, needed is false"),
    ({"layer_norm_elementwise_affine": True}, "layer_norm_elementwise_affine is true, needed is false"),
    ({"layer_norm_elementwise_affine": None}, "layer_norm_elementwise_affine is true, needed is false"),
    ({"do_layer_norm_before": False}, "do_layer_norm_before is false, needed is true"),
    ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm is true, needed is false"),
    ({"activation_function": "gelu"}, 'activation_function is "gelu", needed is "relu"'),
    ({"tie_word_embeddings": False}, "tie_word_embeddings is false, needed is true"),
    ({"word_embed_proj_dim": 16}, "word_embed_proj_dim is 16, needed is 32"),
    ({"ffn_dim": 64}, "ffn_dim is 64, needed is 128"),
    ({"hidden_size": None}, "hidden_size must be a positive integer, found null"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, found 0"),
    ({"vocab_size": "67"}, 'vocab_size must be a positive integer, found "67"'),
    ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
    ({"num_attention_heads": 8}, "num_attention_heads is 8, but cm3leon.decoder.heads is 4"),
    ({"vocab_size": 70}, f"vocab_size is 70, but the vocabulary has {VOCABULARY.size} ids"),
    ({"cm3leon": {"decoder": {}}}, "cm3leon has no decoder and vocabulary that this version can read"),
    ({"cm3leon": None}, "no key cm3leon, which has the layout of the vocabulary"),
    ({"cm3leon": None, "max_position_embeddings": 47}, "no key cm3leon"),
])  # fmt: skip
def test_another_configuration_is_refused_by_field_and_value(changes: dict[str, Any], message: str, exported: Path) -> None:
    change_config(exported, **changes)
    with pytest.raises(OPTFormatError, match=message) as caught:
        import_opt(exported)
    assert str(exported / "config.json") in str(caught.value)


def test_a_stored_decoder_with_an_option_that_opt_lacks_is_refused(exported: Path) -> None:
    own = json.loads((exported / "config.json").read_text())["cm3leon"]
    own["decoder"]["qk_norm"] = True
    change_config(exported, cm3leon=own)
    with pytest.raises(OPTFormatError, match="qk_norm=true"):
        import_opt(exported)


def test_a_vocabulary_that_is_not_the_checkpoints_is_refused(exported: Path) -> None:
    assert import_opt(exported, VOCABULARY).vocabulary == VOCABULARY
    with pytest.raises(OPTFormatError, match="the checkpoint has the vocabulary"):
        import_opt(exported, Vocabulary(43, 20, 4, 9))
    change_config(exported, cm3leon=None)
    with pytest.raises(OPTFormatError, match=f"vocab_size is {VOCABULARY.size}, but the vocabulary has 73 ids"):
        import_opt(exported, Vocabulary(40, 20, 4, 9, reserved=5))


@pytest.mark.parametrize(("change", "message"), [
    (lambda weights: weights.pop(FC1), "layers.0.fc1.weight missing"),
    (lambda weights: [weights.pop(name) for name in sorted(weights)[:5]], "and 2 more tensors missing"),
    (lambda weights: weights.update({FC1.replace("weight", "bias"): torch.zeros(128)}), "layers.0.fc1.bias in the checkpoint, which"),
    (lambda weights: weights.update({FC1: torch.zeros(128, 16)}), r"fc1.weight has shape \(128, 16\), needed is \(128, 32\)"),
    (lambda weights: weights.update({FC1: torch.zeros(128, 32, dtype=torch.int8)}), "fc1.weight is int8, allowed are float32"),
    (lambda weights: weights.update({"lm_head.weight": weights[TOKENS] + 1}), "lm_head.weight differs from model.decoder.embed_tokens"),
])  # fmt: skip
def test_other_tensors_are_refused_by_name(change: Callable[[dict[str, torch.Tensor]], object], message: str, exported: Path) -> None:
    change_weights(exported, change)
    with pytest.raises(OPTFormatError, match=message):
        import_opt(exported)


def test_pickled_weights_are_never_read(exported: Path) -> None:
    (exported / "model.safetensors").rename(exported / "pytorch_model.bin")
    with pytest.raises(OPTFormatError, match=r"in pytorch_model\.bin, a pickle"):
        import_opt(exported)


def test_missing_files_are_named(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no OPT checkpoint here"):
        import_opt(tmp_path / "nowhere")
    (exported / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights here"):
        import_opt(exported)
    index = exported / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {TOKENS: "model-00001-of-00002.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors is missing"):
        import_opt(exported)
    for listed in ({"weight_map": {TOKENS: "../model.safetensors"}}, {"weight_map": {TOKENS: 1}}, {}):
        index.write_text(json.dumps(listed))
        with pytest.raises(OPTFormatError, match="weight_map must name a file of this directory"):
            import_opt(exported)


def test_broken_files_are_named(exported: Path) -> None:
    weights = exported / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(OPTFormatError, match=r"model\.safetensors is not a complete safetensors file"):
        import_opt(exported)
    for text, message in (("{", r"config\.json is not JSON"), ("[]", "expected a mapping, found list")):
        (exported / "config.json").write_text(text)
        with pytest.raises(OPTFormatError, match=message):
            import_opt(exported)


# --- the commands ----------------------------------------------------------------------------------------------------


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command."""
    with pytest.raises(SystemExit) as exited, app.plain_errors():
        app.app([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(exited.value.code or 0), captured.out, captured.err


def test_export_and_import_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    model.save(tmp_path / "ours")
    (tmp_path / "opt").mkdir()
    status, out, err = call(capsys, "export", "--format", "opt", tmp_path / "opt", "--model", tmp_path / "ours")
    assert (status, err) == (0, "")
    assert f"2 layers of width 32, context 48, {model.parameter_count:,} parameters" in out
    assert call(capsys, "import", "--format", "opt", tmp_path / "opt", tmp_path / "again")[0] == 0
    assert same(Decoder.load(tmp_path / "again"), model)
    change_config(tmp_path / "opt", cm3leon=None)
    assert call(capsys, "import", tmp_path / "opt", tmp_path / "third", "--vocabulary", tmp_path / "ours")[0] == 0
    assert same(Decoder.load(tmp_path / "third"), model)
    assert Decoder.load(tmp_path / "third").vocabulary == VOCABULARY


def test_export_takes_the_decoder_of_a_registered_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cm3leon.registry import registry

    asked = []
    make().save(tmp_path / "bundle")
    monkeypatch.setattr(registry, "fetch_bundle", lambda uri: asked.append(uri) or tmp_path / "bundle")  # type: ignore[func-returns-value]
    assert call(capsys, "export", "--format", "opt", tmp_path / "opt")[0] == 0
    assert asked == [CHAMPION]
    assert same(import_opt(tmp_path / "opt"), make())


def test_export_without_a_champion(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    status, _, err = call(capsys, "export", "opt")
    assert status == 2 and "run make run first" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "message"), [
    (["export", "full", "--model", "ours"], "error: full is not empty; name a new directory"),
    (["export", "full/file", "--model", "ours"], "error: full/file is a file; name a directory"),
    (["export", "new", "--model", "nowhere"], "error: nowhere: no decoder here"),
    (["export", "new", "--model", "opt"], "error: opt holds another kind of model"),
    (["export", "new", "--format", "opt", "--model", "norm"], "error: OPT cannot express a decoder with qk_norm=true"),
    (["import", "opt", "full"], "error: full is not empty; name a new directory"),
    (["import", "nowhere", "new"], "error: nowhere: no OPT checkpoint here"),
    (["import", "ours", "new"], "error: ours/config.json: model_type is null"),
    (["import", "pickled", "new"], "error: pickled: the weights are in pytorch_model.bin, a pickle"),
    (["import", "opt", "new", "--vocabulary", "nowhere"], "error: nowhere: no decoder here"),
])  # fmt: skip
def test_users_errors_are_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make().save(Path("ours"))
    make(qk_norm=True).save(Path("norm"))
    export_opt(make(), Path("opt"))
    export_opt(make(), Path("pickled"))
    Path("pickled/model.safetensors").rename("pickled/pytorch_model.bin")
    Path("full").mkdir()
    Path("full/file").write_text("kept")
    status, out, err = call(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(message) and err.count("\n") == 1
    assert not Path("new").exists() and Path("full/file").read_text() == "kept"


def test_other_formats_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, "export", "--format", "gguf", tmp_path / "new")
    assert status == 2 and "gguf" in err
