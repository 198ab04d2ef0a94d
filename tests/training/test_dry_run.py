"""The memory of a step by dry run: against PyTorch's record of what a real step allocates, and what follows when it does not fit."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from trainers_support import CONFIGS, KINDS, Squares, tokenizer_of

from cm3leon.stages import encoder, image_tokenizer
from cm3leon.stages import super_resolution as upscaler
from cm3leon.tracking import runs
from cm3leon.training import clip, run, stage_plans, super_resolution, vqgan
from cm3leon.training.clip import EncoderTrainer
from cm3leon.training.dry_run import largest_that_fits, refuse_too_large
from cm3leon.training.planning import meta_decoder, read_config
from cm3leon.utils.errors import UserError
from cm3leon.utils.world import World

CONFIGS_DIRECTORY = Path(__file__).parents[2] / "configs"
MEMORY_OF = {
    "image_tokenizer": vqgan.step_memory,
    "encoder": clip.step_memory,
    "super_resolution": lambda config, processes: super_resolution.step_memory(config, 32, processes),
}
SIZES = {
    "image_tokenizer": {"image_size": 64, "channels": 16, "batch_size": 8},
    "encoder": {"image_size": 64, "batch_size": 8, "layers": 3, "context_length": 48},
    "super_resolution": {"channels": 16, "patch_size": 32, "batch_size": 8},
}
"""Large enough that activations outweigh weights."""


def real_step(kind: str, precision: str) -> tuple[int, int]:
    """Bytes that a trainer holds, and that it allocates at the peak of computing its gradients, by PyTorch's profiler."""
    config = CONFIGS[kind].model_copy(update={**SIZES[kind], "precision": precision})
    images = Squares(20, 64)
    trainer: Any
    arguments: tuple[Any, ...]
    if kind == "encoder":
        trainer = EncoderTrainer(config, images, images.captions, tokenizer_of(config, images), 0)
        pairs = next(trainer.batches(0))
        full = torch.randint(1, 250, (len(pairs.captions) * 3, config.context_length))
        full[:, -1] = trainer.tokenizer.end
        part = clip.Part(trainer.parts(pairs)[0].pixels, full)
        networks, arguments = [trainer.model], ([part], [2] * len(pairs.captions))
    elif kind == "image_tokenizer":
        trainer = vqgan.ImageTokenizerTrainer(config, images, 0)
        networks, arguments = trainer.networks, (torch.from_numpy(images.pixels[:8]), 6)
    else:
        trainer = super_resolution.SuperResolutionTrainer(config, images, 0)
        networks, arguments = [trainer.model], (next(trainer.batches(0)),)
    # The scratch space of oneDNN's convolutions, on top of that, is small at these sizes.
    trainer.backward(*arguments)  # once before, because the first time also makes what is kept
    for network in networks:
        network.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.backward(*arguments)
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return sum(tensor.nbytes for tensor in trainer.tensors().values()), peak


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_dry_run_counts_what_a_real_step_allocates(kind: str, precision: str) -> None:
    if (kind, precision) == ("super_resolution", "bf16") and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("without AVX-512, PyTorch computes bf16 convolutions by matrices of patches, which no GPU allocates")
    estimated = MEMORY_OF[kind](CONFIGS[kind].model_copy(update={**SIZES[kind], "precision": precision}), 1)
    held, computed = real_step(kind, precision)
    assert estimated.held == pytest.approx(held, rel=0.05)
    assert estimated.computed == pytest.approx(computed, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_falls_with_the_micro_batch_and_the_number_of_processes(kind: str) -> None:
    def needed(micro_batch_size: int | None, processes: int) -> float:
        config = CONFIGS[kind].model_copy(update={**SIZES[kind], "micro_batch_size": micro_batch_size})
        return MEMORY_OF[kind](config, processes).computed

    whole, half = needed(None, 1), needed(4, 1)
    assert 0.3 * whole < half < 0.8 * whole
    assert needed(None, 2) == pytest.approx(half, rel=0.15)


def test_a_step_that_does_not_fit_the_gpu_is_refused_with_the_micro_batch_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["super_resolution"].model_copy(update=SIZES["super_resolution"])
    memory_of = MEMORY_OF["super_resolution"]
    gpu, two = World(device=torch.device("cuda")), memory_of(config.model_copy(update={"micro_batch_size": 2}), 1).total
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=int(1.01 * two / 0.9)))
    with pytest.raises(UserError, match=r"super_resolution needs about 0\.0 GB on each GPU, of whose 0\.0 GB 90% are usable; "
                       r"set super_resolution\.micro_batch_size=2$"):  # fmt: skip
        refuse_too_large("super_resolution", config, memory_of, gpu)
    refuse_too_large("super_resolution", config.model_copy(update={"micro_batch_size": 2}), memory_of, gpu)
    refuse_too_large("super_resolution", config, memory_of, World())  # on a CPU nothing is checked
    assert largest_that_fits(config, 1, memory_of, 1.0) is None
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1))
    with pytest.raises(UserError, match=r"no super_resolution\.micro_batch_size fits, so make the network smaller"):
        refuse_too_large("super_resolution", config, memory_of, gpu)


@pytest.mark.parametrize("stage", [image_tokenizer, encoder, upscaler])
def test_each_stage_that_trains_on_images_refuses_before_it_reads_them(stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where there are no images
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1))
    monkeypatch.setattr(runs, "stage_run", lambda name, config: nullcontext(runs.Run()))
    monkeypatch.setattr(stage, "world", lambda: nullcontext(World(device=torch.device("cuda"))))
    name = stage.__name__.rpartition(".")[2]
    change = r"lower encoder\.batch_size, or set encoder\.image_tower=vit" if stage is encoder else rf"no {name}\.micro_batch_size fits"
    with pytest.raises(UserError, match=rf"{name} needs about .* {change}"):  # tiny's encoder is a resnet, of which no parts are computed
        stage.run(read_config("tiny", (), CONFIGS_DIRECTORY))


def test_a_decoder_that_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config("cm3leon-7b", (), CONFIGS_DIRECTORY)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=int(24e9)))
    model, unused, gpu = meta_decoder(config), Path(), World(device=torch.device("cuda"))
    stream: Any = None
    with pytest.raises(UserError, match=r"pretrain needs about \d+\.\d GB .* of whose 24\.0 GB .*lower pretrain\.micro_batch_size"):
        run.train("pretrain", model, stream, config.pretrain, {}, unused, runs.Run(), gpu, lambda step: None, {})


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["gpu", "cm3leon-350m"])
def test_every_stage_of_a_profile_fits_one_gpu_of_80_gb(profile: str) -> None:
    config = read_config(profile, (), CONFIGS_DIRECTORY)
    plans = stage_plans.stage_plans(config, meta_decoder(config), 1, 72e9)
    assert [plan.stage for plan in plans] == ["image_tokenizer", "encoder", "super_resolution", "pretrain", "sft"]
    assert [plan.stage for plan in plans if plan.needed is None] == ["encoder"]
    assert all((plan.needed or 0) < 72e9 and not plan.advice for plan in plans)


def test_a_plan_that_does_not_fit_names_the_change() -> None:
    pretrained = ("encoder.pretrained_model=ViT-B-32", "encoder.pretrained_weights=laion2b_s34b_b79k")
    config = read_config("tiny", pretrained, CONFIGS_DIRECTORY)
    usable = 0.9 * vqgan.step_memory(config.image_tokenizer, 2).total
    tokenizer, encoder, upscaler, *_ = stage_plans.stage_plans(config, meta_decoder(config), 2, usable)
    assert (tokenizer.gpus, tokenizer.at_once) == (2, "8 of 16")
    rows = int(tokenizer.advice.removeprefix("--set image_tokenizer.micro_batch_size="))
    fits = [
        vqgan.step_memory(config.image_tokenizer.model_copy(update={"micro_batch_size": n}), 2).total <= usable for n in (rows, 2 * rows)
    ]
    assert fits == [True, False]
    assert (encoder.needed, encoder.advice) == (None, "")
    assert (upscaler.gpus, upscaler.at_once, upscaler.advice) == (2, "4 of 8", "")
