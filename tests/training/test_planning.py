"""Plans: the paper's sizes, fit, time and disk, advice that makes a plan fit, the command, and the table of the documentation."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cm3leon.cli import app
from cm3leon.config.schema import Config
from cm3leon.training.memory import optimizer_bytes
from cm3leon.training.planning import Plan, make_plan, meta_decoder, read_config
from cm3leon.training.stage_plans import stage_plans
from cm3leon.utils.errors import ConfigError, UserError

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
CLUSTERS = (ROOT / "docs/clusters.md").read_text()


def config(profile: str = "cm3leon-7b", *changes: str) -> Config:
    return read_config(profile, changes, CONFIGS)


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


# --- fit, time, disk -------------------------------------------------------------------------------------------------


def applied(plan: Plan, advice: str) -> Plan:
    """The plan with one piece of its advice applied."""
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
def test_the_advice_fits(profile: str, gpus: int, device: str) -> None:
    plan = make_plan(config(profile, "pretrain.activation_checkpointing=false", "pretrain.micro_batch_size=16"), gpus, device)
    assert not plan.fits
    assert plan.advice
    for advice in plan.advice:
        assert applied(plan, advice).fits, advice


def test_there_is_no_advice_where_it_fits_or_nothing_helps() -> None:
    assert make_plan(config("tiny"), 1).advice == ()
    hopeless = make_plan(config("cm3leon-7b", "pretrain.model.layers=3200"), 2048, "l4")
    assert not hopeless.fits
    assert hopeless.advice == ()


def test_speed_follows_from_the_devices_flops() -> None:
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


def test_a_stage_has_no_more_gpus_than_rows() -> None:
    few = config("tiny", "sft.batch_size=3")
    plans = {plan.stage: (plan.gpus, plan.at_once) for plan in stage_plans(few, meta_decoder(few), 8, 72e9)}
    assert plans["pretrain"] == (8, "1 of 8") and plans["sft"] == (3, "1 of 3")


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    ({"gpus": 0}, "--gpus 0: must be at least 1"),
    ({"gpus": 4096}, "--gpus 4096: a step has 2048 rows"),
    ({"mfu": 0.0}, "--mfu 0: must be a share above 0"),
    ({"mfu": 1.2}, "--mfu 1.2"),
    ({"mfu": float("nan")}, "--mfu nan"),
    ({"tokens": -1.0}, "--tokens -1: must be above 0"),
    ({"device": "h101"}, "--device h101: unknown; known devices are a100, a100-40gb"),
])  # fmt: skip
def test_impossible_arguments_are_named(changes: dict[str, Any], message: str) -> None:
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
    for text in ("6,727,663,616 (6.73 B)", "64 x h100", "fits", "│ yes", "80.73 GB", "286,102", "image_tokenizer", "imported", "12 of 96"):
        assert text in result.output
    too_large = CliRunner().invoke(app.app, ["plan", "--profile", "cm3leon-7b", "--gpus", "2", "--device", "l40s"])
    assert "It would fit with one of:" in too_large.output
    assert "--gpus 4 --set pretrain.micro_batch_size=2" in too_large.output


def test_a_users_error_of_the_command_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exited, app.plain_errors():
        app.app(["plan", "--profile", "tiny", "--gpus", "0"], standalone_mode=False)
    assert exited.value.code == 2
    assert capsys.readouterr().err == "error: --gpus 0: must be at least 1\n"


# --- docs/clusters.md ------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", CLUSTERS, re.DOTALL)


def test_the_documented_table_is_what_the_command_gives() -> None:
    rows = re.findall(r"^\| `(\S+)` \| (\d+) × (\S+) \| (.+) \|$", CLUSTERS, re.MULTILINE)
    assert {profile for profile, *_ in rows} == {"cm3leon-350m", "cm3leon-760m", "cm3leon-7b"}
    for profile, gpus, device, columns in rows:
        plan = make_plan(config(profile), int(gpus), device)
        assert columns == (
            f"{plan.parameters.total / 1e9:.2f} B | {plan.memory.total / 1e9:.0f} GB | {plan.usable / 1e9:.0f} GB | "
            f"{plan.checkpoint_bytes / 1e9:.1f} GB | {plan.seconds / 86400:.1f} days"
        )
        assert plan.fits


def test_the_documented_scripts_are_valid() -> None:
    for script in blocks("bash"):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    kinds = [document["kind"] for manifest in blocks("yaml") for document in yaml.safe_load_all(manifest)]
    assert kinds == ["Service", "Job"]


def test_documented_torchrun_options_exist() -> None:
    from torch.distributed.run import get_args_parser

    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    arguments = re.findall(r"--nnodes[^'`]*", CLUSTERS)
    assert len(arguments) == 3  # by hand, Slurm, Kubernetes
    used = {option for text in arguments for option in re.findall(r"--[a-z-]+", text)}
    assert len(used) >= 6
    assert used <= known
