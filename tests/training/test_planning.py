"""Plans: the paper's sizes, memory against tensors that the trainer really keeps, advice that holds, and what the documentation says."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from tests_support import decoder_spec
from typer.testing import CliRunner

from cm3leon.cli import app
from cm3leon.config.schema import Config, ConfigError
from cm3leon.models.decoder import Decoder
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.training.checkpoint import Checkpoints
from cm3leon.training.planning import Plan, activation_bytes, block_bytes, count, make_plan, memory, optimizer_bytes, read_config
from cm3leon.training.trainer import setup
from cm3leon.utils.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
CLUSTERS = (ROOT / "docs/clusters.md").read_text()
VOCABULARY = Vocabulary(text_size=200, image_size=64, sentinels=8, tokens_per_image=16, reserved=3)


def config(profile: str = "cm3leon-7b", *changes: str) -> Config:
    return read_config(profile, changes, CONFIGS)


def decoder(**changes: Any) -> Decoder:
    return Decoder(decoder_spec(**{"layers": 2, "width": 128, "heads": 4, "context": 64, **changes}), VOCABULARY)


# --- the paper's sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layers", "width", "heads", "rate", "tokens", "billions"), [
    ("cm3leon-350m", 24, 1024, 16, 6e-4, 1.4e12, 0.37),
    ("cm3leon-760m", 24, 1536, 16, 5e-4, 1.9e12, 0.79),
    ("cm3leon-7b", 32, 4096, 32, 1.2e-4, 2.4e12, 6.73),
])  # fmt: skip
def test_the_papers_sizes(name: str, layers: int, width: int, heads: int, rate: float, tokens: float, billions: float) -> None:
    """Table 1 of arXiv 2309.02591: 4,096 tokens a sequence, 8M a step, warm-up of 1,500 steps."""
    plan = make_plan(config(name), gpus=64)
    pretrain = plan.config.pretrain
    model = pretrain.model
    assert (model.layers, model.width, model.heads, model.context) == (layers, width, heads, 4096)
    assert (pretrain.learning_rate, pretrain.warmup_steps) == (rate, 1500)
    assert plan.step_tokens == pytest.approx(8e6, rel=0.05)
    assert plan.steps * plan.step_tokens == pytest.approx(tokens, rel=1e-3)
    assert plan.parameters.embeddings == (65_536 + 4096) * width
    assert plan.parameters.total / 1e9 == pytest.approx(billions, abs=0.005)


def test_the_count_is_that_of_a_real_decoder() -> None:
    for changes in ({}, {"image_positions": True, "layers": 3}, {"previous_token": True}):
        model = decoder(**changes)
        assert count(model).total == model.parameter_count


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_states_and_checkpoint_are_as_large_as_the_trainers(optimizer: str, tmp_path: Path) -> None:
    section = config("tiny").pretrain.model_copy(update={"optimizer": optimizer})
    state = setup(decoder(), section)
    tokens = torch.randint(4, VOCABULARY.size, (2, 64))
    state.model.losses(tokens, torch.ones(tokens.shape), torch.zeros_like(tokens))[0].backward()
    for update in state.optimizers:
        update.step()
    planned, parameters = memory(state.model, section, gpus=1), list(state.model.parameters())
    assert planned.parameters == sum(p.nbytes for p in parameters)
    assert planned.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    states = [value for update in state.optimizers for values in update.state.values() for value in values.values()]
    assert planned.optimizer == sum(value.nbytes for value in states if value.ndim > 0)

    folder = Checkpoints(tmp_path, {}, 1).save(1, state.tensors(), {"score": None})
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert written == pytest.approx(planned.parameters + planned.optimizer, rel=0.02)


def on_an_accelerator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Attention in the precision of the rest, which a CPU's is not; all blocks share a mask."""
    mask = None if mask is None else converted(mask, v.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)


@functools.cache
def converted(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return mask.to(dtype)


def kept(layers: int, bf16: bool, packing: bool, checkpointing: bool, **changes: Any) -> int:
    """Bytes that autograd keeps in a forward pass of two rows of 64 tokens, parameters left out."""
    torch.manual_seed(0)
    model = decoder(layers=layers, **changes)
    model.recompute = checkpointing
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(4, VOCABULARY.size, (2, 64))
    samples = (torch.ones_like(tokens), torch.arange(64).expand(2, -1)) if packing else (None, None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
            model.losses(tokens, torch.ones(tokens.shape), torch.zeros_like(tokens), *samples)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_a_block_keeps_what_is_planned(bf16: bool, packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cm3leon.models.decoder.attention", on_an_accelerator)
    section = config("cm3leon-7b", f"pretrain.packing={packing}", f"pretrain.precision={'bf16' if bf16 else 'fp32'}").pretrain
    model = decoder(context=64)
    of_a_block = kept(3, bf16, packing, False) - kept(2, bf16, packing, False)
    weights = memory(model, section, gpus=1).gathered / 2  # in bfloat16, which autograd keeps too; of one of the two blocks
    assert of_a_block == 2 * 64 * block_bytes(model.spec, section) + weights


def test_norms_of_queries_and_keys_are_kept_too() -> None:
    section = config("cm3leon-7b", "pretrain.packing=false", "pretrain.precision=fp32").pretrain
    spec = decoder(context=64, qk_norm=True).spec
    of_a_block = kept(3, False, False, False, qk_norm=True) - kept(2, False, False, False, qk_norm=True)
    assert of_a_block == 2 * 64 * block_bytes(spec, section)


def test_with_checkpointing_a_block_keeps_its_input() -> None:
    section = config("cm3leon-7b", "pretrain.packing=false", "pretrain.precision=fp32").pretrain  # checkpointing is on
    few, more = (activation_bytes(decoder(layers=layers).spec, section, 2 * 64, sharded=False) for layers in (2, 3))
    assert kept(3, False, False, True) - kept(2, False, False, True) == more - few


def test_more_gpus_hold_less_each_and_the_same_together() -> None:
    section, model = config().pretrain, decoder()
    for name in ("parameters", "gradients", "optimizer"):
        held = [getattr(memory(model, section, gpus), name) * gpus for gpus in (1, 2, 8)]
        assert held == [held[0]] * 3


@pytest.mark.slow
def test_shards_of_a_real_model_are_as_large_as_planned() -> None:
    """The first of four processes, whose messages go nowhere: its shards, and no more of the gradients than its own after a micro-batch."""
    code = """
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from cm3leon.config.schema import PretrainConfig
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.models.decoder import Decoder, DecoderSpec
from cm3leon.training.planning import memory
from cm3leon.training import distributed
from cm3leon.training.precision import autocast

dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
model = Decoder(DecoderSpec(2, 128, 4, 64, 0.006, 0.0002, False, False, False, False), Vocabulary(200, 64, 8, 16))
config = PretrainConfig(batch_size=16, micro_batch_size=2, precision="bf16", optimizer="adamw")
planned = memory(model, config, 4)
distributed.shard(model, model.blocks, config, distributed.World(0, 4))
tokens = torch.randint(4, 276, (2, 64))
for _ in range(2):
    with autocast(config, torch.device("cpu")):
        total, _ = model.losses(tokens, torch.ones(tokens.shape), torch.zeros_like(tokens))
    total.backward()
    assert planned.gradients == sum(p.grad.to_local().nbytes for p in model.parameters())
assert planned.parameters == sum(p.to_local().nbytes for p in model.parameters())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_packed_rows_add_one_mask_for_all_blocks() -> None:
    plain, packed = (config("cm3leon-7b", f"pretrain.packing={packing}", "pretrain.precision=fp32").pretrain for packing in (False, True))
    few, more = (activation_bytes(decoder().spec, section, 2 * 64, sharded=False) for section in (plain, packed))
    assert kept(2, False, True, True) - kept(2, False, False, True) == pytest.approx(more - few, rel=0.02)  # and the positions


# --- fit, time, disk -------------------------------------------------------------------------------------------------


def applied(plan: Plan, advice: str) -> Plan:
    """The plan with one of its own pieces of advice."""
    gpus = re.search(r"--gpus (\d+)", advice)
    changes = re.findall(r"--set (\S+)", advice)
    changed = config(plan.config.profile, "pretrain.activation_checkpointing=false", *changes)
    return make_plan(changed, int(gpus[1]) if gpus else plan.gpus, plan.device.name)


@pytest.mark.parametrize(("profile", "gpus", "device"), [
    ("cm3leon-350m", 1, "l4"),
    ("cm3leon-760m", 8, "a100-40gb"),
    ("cm3leon-7b", 8, "a100"),
    ("cm3leon-7b", 8, "h100"),
    ("cm3leon-7b", 2, "h200"),
])  # fmt: skip
def test_what_is_advised_fits(profile: str, gpus: int, device: str) -> None:
    plan = make_plan(config(profile, "pretrain.activation_checkpointing=false", "pretrain.micro_batch_size=16"), gpus, device)
    assert not plan.fits
    assert plan.advice
    for advice in plan.advice:
        assert applied(plan, advice).fits, advice


@pytest.mark.slow
def test_nothing_is_advised_where_it_fits_or_nothing_helps() -> None:
    assert make_plan(config("tiny"), 1).advice == ()
    hopeless = make_plan(config("cm3leon-7b", "pretrain.model.layers=3200"), 2048, "l4")
    assert not hopeless.fits
    assert hopeless.advice == ()


def test_speed_is_what_the_devices_do() -> None:
    plan = make_plan(config(), 64, "h100", mfu=0.5)
    assert plan.tokens_per_second * plan.token_flops == pytest.approx(64 * 989e12 * 0.5)
    assert plan.seconds == pytest.approx(286_100 * 2048 * 4096 / plan.tokens_per_second)
    assert make_plan(config(), 64, "h100", 0.5, tokens=2.4e12).steps == pytest.approx(plan.steps, rel=1e-3)
    uneven = make_plan(config(), 60, "h100", mfu=0.5)  # 2,048 rows: some GPUs have 35, most 34
    assert uneven.step_tokens / uneven.tokens_per_second == pytest.approx(35 * 4096 * plan.token_flops / (989e12 * 0.5))


def test_a_checkpoint_holds_parameters_and_optimizer() -> None:
    plan = make_plan(config(), 64)
    assert plan.checkpoint_bytes == 12 * plan.parameters.total
    muon = config("cm3leon-7b", "pretrain.optimizer=muon").pretrain
    assert optimizer_bytes(plan.parameters, muon) == 8 * plan.parameters.embeddings + 4 * plan.parameters.blocks


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    ({"gpus": 0}, "--gpus 0: at least 1"),
    ({"gpus": 4096}, "--gpus 4096: a step has 2048 rows"),
    ({"mfu": 0.0}, "--mfu 0: a share above 0"),
    ({"mfu": 1.2}, "--mfu 1.2"),
    ({"mfu": float("nan")}, "--mfu nan"),
    ({"tokens": -1.0}, "--tokens -1: above 0"),
    ({"device": "h101"}, "--device h101: not known; known are a100, a100-40gb"),
])  # fmt: skip
def test_what_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(config(), **{"gpus": 64, **changes})
    assert message in str(caught.value)


def test_unknown_profiles_and_missing_parameters(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no profile 'cm3leon-8b'.*cm3leon-7b"):
        read_config("cm3leon-8b", configs=CONFIGS)
    with pytest.raises(ConfigError, match="cm3leon configure small"):
        read_config(None, params=tmp_path / "params.yaml")


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = ["plan", "--profile", "cm3leon-7b", "--gpus", "64", "--device", "H100", "--mfu", "0.4", "--tokens", "2.4e12"]
    result = CliRunner().invoke(app.app, arguments)
    assert result.exit_code == 0, result.output
    for part in ("6,727,663,616 (6.73 B)", "64 x h100", "fits", "│ yes", "80.73 GB", "286,102"):
        assert part in result.output
    cramped = CliRunner().invoke(app.app, ["plan", "--profile", "cm3leon-7b", "--gpus", "2", "--device", "l40s"])
    assert "It would fit with one of:" in cramped.output
    assert "--gpus 4 --set pretrain.micro_batch_size=4" in cramped.output


def test_a_users_error_of_the_command_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as left, app.plain_errors():
        app.app(["plan", "--profile", "tiny", "--gpus", "0"], standalone_mode=False)
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: --gpus 0: at least 1\n"


# --- docs/clusters.md ------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", CLUSTERS, re.DOTALL)


def test_the_documented_table_is_what_the_command_gives() -> None:
    rows = re.findall(r"^\| `(\S+)` \| (\d+) × (\S+) \| (.+) \|$", CLUSTERS, re.MULTILINE)
    assert {profile for profile, *_ in rows} == {"cm3leon-350m", "cm3leon-760m", "cm3leon-7b"}
    for profile, gpus, device, figures in rows:
        plan = make_plan(config(profile), int(gpus), device)
        assert figures == (
            f"{plan.parameters.total / 1e9:.2f} B | {plan.memory.total / 1e9:.0f} GB | {plan.usable / 1e9:.0f} GB | "
            f"{plan.checkpoint_bytes / 1e9:.1f} GB | {plan.seconds / 86400:.1f} days"
        )
        assert plan.fits


def test_the_documented_scripts_can_be_read() -> None:
    for script in blocks("bash"):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    kinds = [document["kind"] for manifest in blocks("yaml") for document in yaml.safe_load_all(manifest)]
    assert kinds == ["Service", "Job"]


def test_documented_torchrun_options_exist() -> None:
    from torch.distributed.run import get_args_parser

    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    used = {
        option for command in re.findall(r"torchrun (--.*?)-m cm3leon", CLUSTERS, re.DOTALL) for option in re.findall(r"--[a-z-]+", command)
    }
    assert len(used) >= 7
    assert used <= known
