"""Estimated memory against the tensors that the trainer, autograd and FSDP really keep."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests_support import decoder_spec

from cm3leon.config.schema import Config
from cm3leon.data.batches import Batch
from cm3leon.models.decoder import Decoder
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.training.checkpoint import Checkpoints
from cm3leon.training.memory import activation_bytes, block_bytes, count, estimate_memory
from cm3leon.training.planning import read_config
from cm3leon.training.trainer import setup

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
VOCABULARY = Vocabulary(text_size=200, image_size=64, sentinels=8, tokens_per_image=16, reserved=3)


def config(profile: str = "cm3leon-7b", *changes: str) -> Config:
    return read_config(profile, changes, CONFIGS)


def decoder(**changes: Any) -> Decoder:
    return Decoder(decoder_spec(**{"layers": 2, "width": 128, "heads": 4, "context": 64, **changes}), VOCABULARY)


def test_the_count_is_that_of_a_real_decoder() -> None:
    for changes in ({}, {"image_positions": True, "layers": 3}, {"previous_token": True}):
        model = decoder(**changes)
        assert count(model).total == model.parameter_count


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parameters_gradients_states_and_checkpoint_have_the_size_of_real_ones(optimizer: str, tmp_path: Path) -> None:
    section = config("tiny").pretrain.model_copy(update={"optimizer": optimizer})
    state = setup(decoder(), section)
    tokens = torch.randint(4, VOCABULARY.size, (2, 64))
    state.model.losses(Batch.of_tokens(tokens))[0].backward()
    for update in state.optimizers:
        update.step()
    estimated, parameters = estimate_memory(state.model, section, gpus=1), list(state.model.parameters())
    assert estimated.parameters == sum(p.nbytes for p in parameters)
    assert estimated.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    states = [value for update in state.optimizers for values in update.state.values() for value in values.values()]
    assert estimated.optimizer == sum(value.nbytes for value in states if value.ndim > 0)

    folder = Checkpoints(tmp_path, {}, 1).save(1, state.tensors(), {"score": None})
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert written == pytest.approx(estimated.parameters + estimated.optimizer, rel=0.02)


def attention_on_a_gpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *packed: Any) -> torch.Tensor:
    """Attention in the run's precision, as on a GPU."""
    return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, scale=scale)


def saved_bytes(layers: int, bf16: bool, checkpointing: bool, **changes: Any) -> int:
    """Bytes that autograd keeps in a forward pass of two rows of 64 tokens, without the parameters."""
    torch.manual_seed(0)
    model = decoder(layers=layers, **changes)
    model.recompute = checkpointing
    parameters = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(4, VOCABULARY.size, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
            model.losses(Batch.of_tokens(tokens))
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"rope": True}, {"qk_norm": True, "rope": True}], ids=str)
def test_a_block_keeps_the_estimated_activations(options: dict[str, bool], bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cm3leon.models.decoder.attention", attention_on_a_gpu)
    section = config("cm3leon-7b", f"pretrain.precision={'bf16' if bf16 else 'fp32'}").pretrain
    model = decoder(context=64, **options)
    per_block = saved_bytes(3, bf16, False, **options) - saved_bytes(2, bf16, False, **options)
    weights = estimate_memory(model, section, gpus=1).gathered / 2  # one of two blocks' weights in bfloat16, which autograd keeps too
    assert per_block == 2 * 64 * block_bytes(model.spec, section) + weights


def test_packing_adds_a_row_to_a_micro_batch() -> None:
    """Which is what the stream may fill it to: tests/data/test_batches.py."""
    packed, model = config().pretrain, decoder()
    assert packed.packing
    rows = {changes["micro_batch_size"]: estimate_memory(model, packed.model_copy(update=changes), 8).activations
            for changes in ({"micro_batch_size": 4}, {"micro_batch_size": 5, "packing": False})}  # fmt: skip
    assert rows[4] == rows[5]


def test_with_activation_checkpointing_a_block_keeps_its_input() -> None:
    section = config("cm3leon-7b", "pretrain.precision=fp32").pretrain  # checkpointing is on
    few, more = (activation_bytes(decoder(layers=layers).spec, section, 2 * 64, sharded=False) for layers in (2, 3))
    assert saved_bytes(3, False, True) - saved_bytes(2, False, True) == more - few


def test_all_gpus_together_hold_the_same_whatever_their_number() -> None:
    section, model = config().pretrain, decoder()
    for name in ("parameters", "gradients", "optimizer"):
        held = [getattr(estimate_memory(model, section, gpus), name) * gpus for gpus in (1, 2, 8)]
        assert held == [held[0]] * 3


@pytest.mark.slow
def test_shards_of_a_real_model_have_the_estimated_size() -> None:
    """The first of four processes, with fake communication: it holds its shards, also of the gradients after each micro-batch."""
    code = """
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from cm3leon.config.schema import PretrainConfig
from cm3leon.data.batches import Batch
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.models.decoder import Decoder, DecoderSpec
from cm3leon.training.memory import estimate_memory
from cm3leon.training import distributed
from cm3leon.training.precision import autocast

dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
model = Decoder(DecoderSpec(2, 128, 4, 64, 0.006, 0.0002, False, False, False, False), Vocabulary(200, 64, 8, 16))
config = PretrainConfig(batch_size=16, micro_batch_size=2, precision="bf16", optimizer="adamw")
estimated = estimate_memory(model, config, 4)
distributed.shard(model, model.blocks, config, distributed.World(0, 4))
tokens = torch.randint(4, 276, (2, 64))
for _ in range(2):
    with autocast(config, torch.device("cpu")):
        total, _ = model.losses(Batch.of_tokens(tokens))
    total.backward()
    assert estimated.gradients == sum(p.grad.to_local().nbytes for p in model.parameters())
assert estimated.parameters == sum(p.to_local().nbytes for p in model.parameters())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
