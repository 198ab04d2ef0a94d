# ruff: noqa: E402 (a bare machine has not installed the package, so its path comes first)
"""Everything that a GPU can show, in one command: python benchmarks/gpu.py [--out DIR] [--minutes 9]

For a bare machine with torch, safetensors, pyarrow, NumPy and a GPU, without network. First checks that the device computes what a CPU
does, then speed: training at the paper's sizes, generation, the image tokenizer. Random weights and made-up documents. Every figure is
written to ``DIR/results.json`` as soon as it is measured, so that the same command goes on where one ended; ``DIR/results.md`` shows them.
``--rehearse`` runs all of it with tiny shapes on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType

from cm3leon.data.batches import Share, TokenStream, collate, pack, share_of
from cm3leon.data.sequences import PretrainingSamples
from cm3leon.data.tokens import Document, TokenStore, write_tokens
from cm3leon.generation import engine
from cm3leon.generation.cache import DecodingCache
from cm3leon.generation.prompts import image_prompt
from cm3leon.generation.sampling import Sampler
from cm3leon.models.decoder import Block, Decoder, DecoderSpec
from cm3leon.models.vqgan import ImageTokenizer, ImageTokenizerSpec
from cm3leon.sequence.grammar import Prompt, Vocabulary
from cm3leon.training.hardware import flops_per_token, peak_flops
from cm3leon.training.memory import estimate_memory
from cm3leon.training.trainer import State, read_losses, setup, train_step
from cm3leon.utils.world import World, world

OPTIONS = {"qk_norm": True, "image_positions": True, "rope": True, "previous_token": True}
"""The decoder's options that are not in the paper."""
RESERVE_SECONDS = 45
"""No measurement is started later than this before the end of the time."""
RETRIEVED = [0.1, 0.2, 0.7]
Measurement = tuple[str, Callable[..., dict[str, Any]], dict[str, Any]]
"""Name, function, and its arguments."""


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        shapes: name -> layers, width, heads.
        train: shapes that are trained.
        rows: micro-batches, in rows of ``context`` tokens.
        images: numbers of images that are generated at once.
        steps: training steps that are timed, after as many that are not.
    """

    shapes: dict[str, tuple[int, int, int]]
    train: tuple[str, ...]
    rows: tuple[int, ...]
    context: int
    vocabulary: Vocabulary
    images: tuple[int, ...]
    tokenizer: ImageTokenizerSpec
    tokenizer_images: int
    steps: int


PAPER = Sizes(
    {"350m": (24, 1024, 16), "760m": (24, 1536, 16), "7b": (32, 4096, 32)},
    ("350m", "760m"),
    (4, 8, 16),
    4096,
    Vocabulary(56_320, 8192, 512, 1024, 508),
    (1, 8, 64),
    ImageTokenizerSpec(256, 1, 128, (1, 1, 2, 4), 2, 2, 256, 8192, 3),
    64,
    5,
)
TINY = Sizes(
    {"350m": (2, 64, 2), "760m": (2, 96, 2), "7b": (2, 128, 2)},
    ("350m",),
    (2,),
    256,
    Vocabulary(300, 64, 16, 16, 4),
    (1, 4),
    ImageTokenizerSpec(32, 2, 8, (1, 2), 1, 1, 8, 64, 3),
    4,
    1,
)
SMALL = Vocabulary(300, 128, 16, 64, 4)
"""The vocabulary of the checks."""


# --- made-up data and models -----------------------------------------------------------------------------------------


def made_up_samples(vocabulary: Vocabulary, context: int, count: int = 256) -> PretrainingSamples:
    """Training samples of documents of random codes and captions of 5 to 20 tokens, with up to two retrieved documents."""
    rng = np.random.default_rng(0)

    def documents() -> Iterator[Document]:
        for number in range(count):
            codes = rng.integers(vocabulary.image_size, size=vocabulary.tokens_per_image).astype(np.uint16)
            yield Document(f"{number:016x}", codes, [rng.integers(vocabulary.text_size, size=int(rng.integers(5, 21)))])

    with tempfile.TemporaryDirectory() as folder:  # the store maps its files, which stay until it is gone
        write_tokens(Path(folder), "train", documents(), vocabulary.tokens_per_image, vocabulary.text_size)
        store = TokenStore(Path(folder))
    neighbors = {name: [store.ids[(row + i) % count] for i in range(1, 5)] for row, name in enumerate(store.ids)}
    objective: Any = SimpleNamespace(mean_masks=1.0, segment_rate=0.3, caption_share=0.67, across_breaks=False, text_weight=1.0)
    return PretrainingSamples(store, store, neighbors, vocabulary, objective, RETRIEVED, context, 0)


def make_decoder(
    shape: tuple[int, int, int], context: int, vocabulary: Vocabulary, device: torch.device, dtype: torch.dtype, **options: Any
) -> Decoder:
    """A decoder with random weights, none of them zero; the same for any device."""
    layers, width, heads = shape
    off = dict.fromkeys(OPTIONS, False)
    spec = DecoderSpec(layers, width, heads, context, init_std=0.02, position_std=0.0002, **{**off, **options})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        with device:
            model = Decoder(spec, vocabulary)
    finally:
        torch.set_default_dtype(before)
    for block in model.blocks:
        assert isinstance(block, Block)
        torch.nn.init.normal_(block.attention.out.weight, std=0.02)
        torch.nn.init.normal_(block.down.weight, std=0.02)
    return model


def check_model(**options: Any) -> Decoder:
    """The decoder of the checks, on the CPU in float32; its logits differ enough that sampling has few near-ties."""
    model = make_decoder((2, 128, 4), 512, SMALL, torch.device("cpu"), torch.float32, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def on(device: torch.device, dtype: torch.dtype, model: Decoder) -> Decoder:
    """A copy of a decoder."""
    copy = Decoder(model.spec, model.vocabulary)
    copy.load_state_dict(model.state_dict())
    return copy.to(device, dtype)


def train_settings(**changes: Any) -> Any:
    """Parameters of the trainer, as of profile ``cm3leon-350m``."""
    plain = {
        "batch_size": 8, "micro_batch_size": None, "packing": True, "steps": 100, "warmup_steps": 1, "learning_rate": 6e-4,
        "final_learning_rate": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.95), "clip": 1.0, "z_loss": 0.0, "optimizer": "adamw",
        "precision": "bf16", "compile": False, "activation_checkpointing": False,
    }  # fmt: skip
    return SimpleNamespace(**{**plain, **changes})


def sampler(**changes: Any) -> Sampler:
    """Guidance 3 and a nucleus of 0.9."""
    plain = {
        "temperature": 1.0, "top_p": 0.9, "top_k": None, "guidance": 3.0, "guidance_schedule": "constant", "image_guidance": 1.5,
        "contrastive": 0.0, "contrastive_k": 4, "contrastive_alpha": 0.5,
    }  # fmt: skip
    settings: Any = SimpleNamespace(**{**plain, **changes})
    return Sampler(settings)


def streams_of(vocabulary: Vocabulary) -> list[Prompt]:
    """The conditional and the unconditional stream of a caption of 16 tokens."""
    text = vocabulary.text(np.random.default_rng(0).integers(vocabulary.text_size, size=16))
    return [image_prompt([("text", text)], [], vocabulary, masked) for masked in (frozenset(), frozenset({0}))]


def generate(model: Decoder, images: int, settings: Sampler) -> np.ndarray:
    """Codes (images, tokens) of one prompt."""
    return engine.generate_images(model.eval(), [streams_of(model.vocabulary)], [list(range(images))], settings)[0]


@contextmanager
def counted_passes() -> Iterator[list[int]]:
    """A list that gets an element for each pass of decoding, compiled or not; reading a prompt is none."""
    passes: list[int] = []
    advance = DecodingCache.advance

    def counting(self: DecodingCache, *arguments: Any) -> Tensor:
        passes.append(1)
        return advance(self, *arguments)

    with patch.object(DecodingCache, "advance", counting):
        yield passes


# --- checks ----------------------------------------------------------------------------------------------------------


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative distance of two tensors."""
    expected = expected.float().cpu()
    return float((found.float().cpu() - expected).norm() / expected.norm())


def losses_and_gradients(model: Decoder, batch: Any, device: torch.device, precision: str) -> tuple[Tensor, Tensor]:
    """Losses of the tokens, and all gradients as one vector."""
    model.zero_grad()
    with torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext():
        total, losses = model.losses(batch.to(device))
    total.backward()
    return losses.flatten(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@dataclass
class Run:
    """A run of the benchmark: its device, sizes and results so far."""

    device: torch.device
    sizes: Sizes
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # Each check returns figures and bounds: name -> (value, bound), good if value <= bound.

    def losses(self) -> dict[str, Any]:
        """Losses and gradients of packed samples against a CPU in float32, with the paper's decoder and with all options."""
        draw = made_up_samples(SMALL, 512)
        batch = pack([draw(0, row) for row in range(8)])
        found = {}
        for name, options in (("paper", {}), ("options", OPTIONS)):
            model = check_model(**options)
            expected = losses_and_gradients(model, batch, torch.device("cpu"), "fp32")
            for precision, bounds in (("fp32", (1e-4, 1e-3)), ("bf16", (0.02, 0.1))):
                computed = losses_and_gradients(on(self.device, torch.float32, model), batch, self.device, precision)
                for what, one, other, bound in zip(("losses", "gradients"), computed, expected, bounds, strict=True):
                    found[f"{name}, {precision}: {what}"] = (distance(one, other), bound)
        return found

    def packing(self) -> dict[str, Any]:
        """Losses of packed samples against one sample a row."""
        draw = made_up_samples(SMALL, 512)
        samples = [draw(0, row) for row in range(8)]
        model = on(self.device, torch.float32, check_model(**OPTIONS))
        found = {}
        for precision, bound in (("fp32", 1e-5), ("bf16", 0.02)):
            packed, gradients = losses_and_gradients(model, pack(samples), self.device, precision)
            padded = collate(samples)
            rows, padded_gradients = losses_and_gradients(model, padded, self.device, precision)
            rows = rows.view(padded.tokens.shape)
            alone = torch.cat([rows[row, : len(sample.masked.tokens)] for row, sample in enumerate(samples)])
            found[f"{precision}: losses"] = (distance(packed, alone), bound)
            found[f"{precision}: gradients"] = (distance(gradients, padded_gradients), 10 * bound)
        return found

    def decoding(self) -> dict[str, Any]:
        """Share of codes that differ from a CPU's in float32; by Jacobi iteration from one by one; int8 from bfloat16, in logits."""
        model = check_model(**OPTIONS)
        expected = generate(model, 4, sampler())
        exact, half = on(self.device, torch.float32, model), on(self.device, torch.bfloat16, model)
        found: dict[str, Any] = {"fp32: codes that differ": (float((generate(exact, 4, sampler()) != expected).mean()), 0.01)}
        window, engine.MAX_WINDOW = engine.MAX_WINDOW, 1
        try:
            one_by_one = generate(exact, 4, sampler())
        finally:
            engine.MAX_WINDOW = window
        found["fp32: Jacobi, codes that differ"] = (float((generate(exact, 4, sampler()) != one_by_one).mean()), 0.01)
        tokens = torch.randint(4, SMALL.size, (2, 64), device=self.device)
        with torch.inference_mode():
            before = half(tokens, torch.zeros_like(tokens))
            half.quantize()
            found["int8: hidden states"] = (distance(half(tokens, torch.zeros_like(tokens)), before), 0.05)
        return found

    def tokenizer(self) -> dict[str, Any]:
        """Share of image codes that differ from a CPU's, and their reconstructions."""
        torch.manual_seed(0)
        model = ImageTokenizer(replace(self.sizes.tokenizer, image_size=min(64, self.sizes.tokenizer.image_size))).eval()
        images = torch.rand(8, 3, model.spec.image_size, model.spec.image_size) * 2 - 1
        with torch.inference_mode():
            expected = model.encode(images)
            reconstructions = model.decode(expected)
            copy = model.to(self.device)
            codes = copy.encode(images.to(self.device)).cpu()
            found = copy.decode(expected.to(self.device))
        return {
            "codes that differ": (float((codes != expected).float().mean()), 0.005),
            "reconstructions": (distance(found, reconstructions), 0.01),
        }

    def compiled(self) -> dict[str, Any]:
        """Training with compiled blocks and generation with compiled passes (CUDA graphs on a GPU) against both uncompiled."""
        plain, compiled = ([loss for _, loss in self._train(check_model(), 3, compile=own)] for own in (False, True))
        model = on(self.device, torch.float32, check_model())
        expected = generate(model, 2, sampler())
        model.compiled_decoding = True
        return {
            "losses": (max(abs(a - b) for a, b in zip(plain, compiled, strict=True)), 0.05),
            "codes that differ": (float((generate(model, 2, sampler()) != expected).mean()), 0.02),
        }

    def processes(self) -> dict[str, Any]:
        """Losses of training in two processes (FSDP) against one; on a machine with one GPU not measured."""
        if self.device.type == "cuda" and torch.cuda.device_count() < 2:
            return {"not measured": "one GPU"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, "--worker"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        two = json.loads(done.stdout.strip().splitlines()[-1])
        one = [loss for _, loss in self._train(check_model(), 3, precision="fp32")]
        return {"losses": (max(abs(a - b) for a, b in zip(one, two, strict=True)), 1e-4)}

    def _train(self, model: Decoder, steps: int, own: World | None = None, **changes: Any) -> Iterator[tuple[State, float]]:
        """Train on made-up samples; the state after each step, and its loss."""
        own = own or World(device=self.device)
        settings = train_settings(micro_batch_size=2, **changes)
        state = setup(model, settings, own)
        stream = TokenStream(made_up_samples(SMALL, 512), 256, settings.batch_size, 0, 512)
        for step in range(steps):
            train_step(state, share_of(stream, step, own.rank, own.size, settings.micro_batch_size), settings, "check")
            read_losses(state, "check")
            yield state, state.losses[-1]

    # --- speed -------------------------------------------------------------------------------------------------------

    def training(self, shape: str, rows: int, compiled: bool, checkpointing: bool) -> dict[str, Any]:
        """Tokens per second and MFU of micro-batches of ``rows`` rows, and the peak of memory beside the planned one."""
        state, settings, shares = self._prepared(shape, rows, compiled, checkpointing)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        steps = self.sizes.steps
        for share in shares[:steps]:
            train_step(state, share, settings, shape)
        self.synchronize()
        start = time.perf_counter()
        for share in shares[steps:]:
            train_step(state, share, settings, shape)
        self.synchronize()
        seconds = time.perf_counter() - start
        tokens = sum(share.tokens for share in shares[steps:])
        length = statistics.mean(share.length for share in shares[steps:])
        found = {"tokens/s": tokens / seconds, "step, s": seconds / steps}
        if self.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name())
            flops = flops_per_token(state.model.spec, state.model.vocabulary.size, length)
            found["MFU"] = tokens / seconds * flops / peak if peak else float("nan")
            found["memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
        found["planned, GB"] = estimate_memory(state.model, settings, 1).total / 1e9
        return found

    def _prepared(self, shape: str, rows: int, compiled: bool, checkpointing: bool) -> tuple[State, Any, list[Share]]:
        sizes = self.sizes
        model = make_decoder(sizes.shapes[shape], sizes.context, sizes.vocabulary, self.device, torch.float32)
        settings = train_settings(batch_size=rows, micro_batch_size=None, compile=compiled, activation_checkpointing=checkpointing)
        state = setup(model, settings, World(device=self.device))
        stream = TokenStream(made_up_samples(sizes.vocabulary, sizes.context), 256, rows, 0, sizes.context)
        return state, settings, [share_of(stream, step, 0, 1, None) for step in range(2 * sizes.steps)]

    def profile(self) -> dict[str, Any]:
        """Where the time of a training step goes: the operations that take most of it, at the best micro-batch found."""
        measured = {key: value for key, value in self.results.items() if key.startswith("training") and "tokens/s" in value}
        if not measured:
            return {"not measured": "no training was measured"}
        best = max(measured, key=lambda key: measured[key].get("MFU", measured[key]["tokens/s"]))
        state, settings, shares = self._prepared(**measured[best]["arguments"])
        for share in shares[: self.sizes.steps]:
            train_step(state, share, settings, best)
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        with torch.profiler.profile(activities=kinds) as profiler:
            train_step(state, shares[-1], settings, best)
            self.synchronize()
        name, events = "self_cpu_time_total", list(profiler.key_averages())
        if self.device.type == "cuda":  # kernels alone: the operators that launched them have the same time again
            name = "self_device_time_total"
            events = [event for event in events if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)]
        times = {event.key: float(getattr(event, name)) for event in events}
        total = sum(times.values())
        first = sorted(times, key=times.__getitem__, reverse=True)[:12]
        return {"of": best, **{key[:80]: f"{times[key] / total:.1%}" for key in first}}

    def generation(self, shape: str, images: int) -> dict[str, Any]:
        """Seconds for images of one prompt with guidance, in bfloat16, passes compiled; the floor is reading the weights once a pass."""
        sizes = self.sizes
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        context = sizes.vocabulary.tokens_per_image + 64
        model = make_decoder(sizes.shapes[shape], context, sizes.vocabulary, self.device, dtype).eval()
        model.compiled_decoding = self.device.type == "cuda"
        generate(model, images, sampler())
        self.synchronize()
        start = time.perf_counter()
        with counted_passes() as passes:
            generate(model, images, sampler())
        self.synchronize()
        seconds = time.perf_counter() - start
        weights = sum(p.nbytes for p in model.blocks.parameters())
        floor = weights / self._bandwidth() * sizes.vocabulary.tokens_per_image
        found = {"seconds": seconds, "images/s": images / seconds, "floor one by one, s": floor, "share of the floor": floor / seconds}
        return found | {"passes": float(len(passes))}

    def _bandwidth(self) -> float:
        """Bytes a second of a sum over much memory, the best of five."""
        data = torch.ones(1 << (28 if self.device.type == "cuda" else 22), device=self.device)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            data.sum().item()
            times.append(time.perf_counter() - start)
        return data.nbytes / min(times)

    def images(self) -> dict[str, Any]:
        """Images a second that the tokenizer encodes and decodes, in float32 (TF32 on GPUs) and under bfloat16 autocast."""
        torch.manual_seed(0)
        model = ImageTokenizer(self.sizes.tokenizer).to(self.device).eval()
        images = torch.rand(self.sizes.tokenizer_images, 3, self.sizes.tokenizer.image_size, self.sizes.tokenizer.image_size) * 2 - 1
        images = images.to(self.device)
        found: dict[str, Any] = {}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                codes = model.encode(images, dtype)
                for what, call in (
                    ("encoded", lambda dtype=dtype: model.encode(images, dtype)),
                    ("decoded", lambda codes=codes: model.decode(codes)),
                ):
                    call()
                    self.synchronize()
                    start = time.perf_counter()
                    for _ in range(3):
                        call()
                    self.synchronize()
                    found[f"{what}/s, {name}"] = 3 * len(images) / (time.perf_counter() - start)
        return found


# --- the run ---------------------------------------------------------------------------------------------------------


def measurements(run: Run) -> list[Measurement]:
    """Name, function and arguments of everything that is measured, in order."""
    checks: list[Measurement] = [(f"check {check.__name__}", check, {}) for check in (run.losses, run.packing, run.decoding, run.tokenizer)]
    later: list[Measurement] = [(f"check {check.__name__}", check, {}) for check in (run.compiled, run.processes)]
    training = [
        (f"training {shape}, {rows} rows{', compiled' * compiled}{', checkpointing' * checkpointing}", run.training,
         {"shape": shape, "rows": rows, "compiled": compiled, "checkpointing": checkpointing})
        for shape in run.sizes.train
        for rows, compiled, checkpointing in [*((rows, False, False) for rows in run.sizes.rows), (run.sizes.rows[-1], True, False),
                                              (run.sizes.rows[-1], False, True)]
    ]  # fmt: skip
    generation = [
        (f"generation {shape}, {images} at once", run.generation, {"shape": shape, "images": images})
        for images in run.sizes.images
        for shape in run.sizes.shapes
    ]
    half = len(run.sizes.rows) + 2
    return [
        *checks, *training[:half], *generation[: len(run.sizes.shapes)], *later, ("profile", run.profile, {}), ("images", run.images, {}),
        *training[half:], *generation[len(run.sizes.shapes) :],
    ]  # fmt: skip


def failed_bounds(figures: dict[str, Any]) -> list[str]:
    """Names of the figures of a check that are above their bounds."""
    return [name for name, value in figures.items() if isinstance(value, list | tuple) and not value[0] <= value[1]]


def shown(value: Any) -> str:
    """A figure for the table."""
    if isinstance(value, list | tuple):
        return f"{value[0]:.2g} (bound {value[1]:.2g})"
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def markdown(device: str, results: dict[str, dict[str, Any]]) -> str:
    """All results as a table."""
    lines = [f"Measured on: {device}, torch {torch.__version__}.", "", "| what | result | seconds |", "|---|---|---|"]
    for name, found in results.items():
        figures = {key: value for key, value in found.items() if key not in ("arguments", "took")}
        verdict = ""
        if name.startswith("check") and "error" not in figures and "not measured" not in figures:
            verdict = f"**differs**: {', '.join(bad)}; " if (bad := failed_bounds(figures)) else "equal; "
        lines.append(f"| {name} | {verdict}{'; '.join(f'{key} {shown(value)}' for key, value in figures.items())} | {found['took']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure what is not measured yet; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--skip", help="leave out what has this in its name")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    if options.worker:
        return worker()
    if not options.rehearse and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --rehearse runs everything with tiny shapes on a CPU")
    device = torch.device("cpu" if options.rehearse else "cuda")
    name = f"{platform.processor() or 'CPU'} (rehearsal)" if options.rehearse else torch.cuda.get_device_name()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    before: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"device": name, "results": {}}
    if before["device"] != name:
        raise SystemExit(f"{file} is of another device, {before['device']}; name another --out")
    if before.get("torch", torch.__version__) != torch.__version__:
        raise SystemExit(f"{file} was measured with torch {before['torch']}, here is {torch.__version__}; name another --out")
    run = Run(device, TINY if options.rehearse else PAPER, before["results"])
    chosen = [measurement for measurement in measurements(run) if not (options.skip and options.skip in measurement[0])]
    for what, function, arguments in chosen:
        measured = what in run.results and "error" not in run.results[what]
        if measured or time.monotonic() > end - RESERVE_SECONDS * (not options.rehearse):
            continue
        start = time.monotonic()
        try:
            found = function(**arguments)
        except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError, ImportError) as error:  # the others are still measured
            found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        run.results[what] = {**found, "arguments": arguments, "took": time.monotonic() - start}
        file.write_text(json.dumps({"device": name, "torch": torch.__version__, "results": run.results}, indent=1) + "\n")
        (options.out / "results.md").write_text(markdown(name, run.results))
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(markdown(name, run.results))
    if missing := [what for what, *_ in chosen if what not in run.results]:
        print(f"not measured yet, for want of time: {', '.join(missing)}; the same command goes on")
    return int(any("error" in found or failed_bounds(found) for what, found in run.results.items() if what.startswith("check")))


def worker() -> int:
    """One of the two processes of :meth:`Run.processes`."""
    with world() as own:
        run = Run(own.device, TINY)
        losses = [loss for _, loss in run._train(check_model(), 3, own, precision="fp32")]
        if own.rank == 0:
            print(json.dumps(losses))
    return 0


if __name__ == "__main__":
    sys.exit(main())
