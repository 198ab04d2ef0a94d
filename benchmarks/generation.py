"""Speed of image generation, compared with ``OPTForCausalLM`` of the same weights and with the floor that memory bandwidth sets.

    python benchmarks/generation.py                  # profile small's decoder
    python benchmarks/generation.py --shape plain    # a small one without the options that OPT lacks
    python benchmarks/generation.py --shape 350m     # 350M, vocabulary 65,536, 256 tokens an image

Needs transformers. Eight candidates of one prompt with classifier-free guidance: ours in one call, OPT's through ``generate`` with
``guidance_scale``. Both run in this process, alternating; the ratio is of the medians. Before that both decode greedily, and the images
must be equal; profile small's decoder is compared with an OPT of its shape, which lacks its options. Codes are decoded one by one, since
random weights draw codes that cannot be guessed; ``benchmarks/jacobi.py`` measures guessing. The floor is the time to read the weights that
a step needs once, at the memory bandwidth measured here.
On a GPU, in bfloat16, ``--alone`` measures seconds and throughput for 1 to 64 images at once of 1,024 tokens, for 350m, 760m or 7b;
``--compiled`` compiles ours.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cm3leon.config.schema import Config, DecodingConfig
from cm3leon.generation import engine
from cm3leon.generation.prompts import image_prompt
from cm3leon.generation.sampling import Sampler
from cm3leon.models.decoder import Block, Decoder, DecoderSpec
from cm3leon.models.opt import export_opt
from cm3leon.sequence.grammar import Prompt, Vocabulary
from cm3leon.training.planning import vocabulary_of
from cm3leon.utils.device import default_device
from cm3leon.utils.torchvision_compat import make_importable

SHAPES = {
    "plain": (4, 128, 4, 2563, 2048, 64),
    "350m": (24, 1024, 16, 65_536, 8192, 256),
    "760m": (24, 1536, 16, 65_536, 8192, 1024),
    "7b": (32, 4096, 32, 65_536, 8192, 1024),
}
"""Shape -> layers, width, heads, vocabulary, image codes, tokens an image; besides these there is profile small's."""
WITHOUT_OPTIONS = {"qk_norm": False, "image_positions": False, "rope": False, "previous_token": False}
"""As the paper's decoder, which OPT can express."""
CANDIDATES, GUIDANCE, PROMPT_TOKENS, SENTINELS = 8, 3.0, 24, 8
DEVICE = default_device()


def shape_of(name: str, tokens: int | None) -> tuple[DecoderSpec, Vocabulary]:
    """A decoder's shape and its vocabulary, with room for a prompt and ``tokens`` an image; None: the shape's."""
    if name == "small":
        config = Config()
        spec, layout = DecoderSpec.from_config(config.pretrain.model), vocabulary_of(config)
        return spec, replace(layout, tokens_per_image=tokens or layout.tokens_per_image)
    layers, width, heads, vocabulary, codes, per_image = SHAPES[name]
    layout = Vocabulary(vocabulary - 4 - SENTINELS - codes, codes, SENTINELS, tokens or per_image)
    context = layout.tokens_per_image + 64
    return DecoderSpec(layers, width, heads, context, init_std=0.02, position_std=0.0002, **WITHOUT_OPTIONS), layout


def make_model(shape: str, tokens: int | None) -> Decoder:
    """A decoder with random weights, none of them zero."""
    spec, layout = shape_of(shape, tokens)
    torch.manual_seed(0)
    with DEVICE:
        model = Decoder(spec, layout)
    for block in model.blocks:
        assert isinstance(block, Block)
        torch.nn.init.normal_(block.attention.out.weight, std=0.02)
        torch.nn.init.normal_(block.down.weight, std=0.02)
    return (model.bfloat16() if DEVICE.type == "cuda" else model).eval()


def guidance_streams(model: Decoder) -> list[Prompt]:
    """The conditional and the unconditional stream."""
    text = model.vocabulary.text(np.random.default_rng(0).integers(model.vocabulary.text_size, size=PROMPT_TOKENS))
    return [image_prompt([("text", text)], [], model.vocabulary, masked) for masked in (frozenset(), frozenset({0}))]


def ours(model: Decoder, candidates: int, **settings: float) -> np.ndarray:
    """Codes (candidates, tokens) of the prompt."""
    sampler = Sampler(DecodingConfig.model_validate({"guidance": GUIDANCE, "top_p": 0.9, "temperature": 1.0, **settings}))
    engine.window_length = lambda width, rows, steps: 1
    return engine.generate_images(model, [guidance_streams(model)], [list(range(candidates))], sampler)[0]


def has_options(model: Decoder) -> bool:
    """Whether the decoder has options that OPT lacks."""
    return replace(model.spec, **WITHOUT_OPTIONS) != model.spec


def opt_of(model: Decoder) -> torch.nn.Module:
    """The same weights in transformers; of a decoder with options that OPT lacks, another one of its shape without them."""
    make_importable()
    from transformers import OPTForCausalLM

    if has_options(model):
        model = Decoder(replace(model.spec, **WITHOUT_OPTIONS), model.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        export_opt(model, Path(folder) / "opt")
        return OPTForCausalLM.from_pretrained(Path(folder) / "opt", attn_implementation="sdpa").eval()


def theirs(opt: torch.nn.Module, model: Decoder, candidates: int, *, greedy: bool) -> np.ndarray:
    """As :func:`ours`, through transformers."""
    from transformers import LogitsProcessor, LogitsProcessorList

    vocabulary = model.vocabulary
    outside = torch.full((vocabulary.size,), -torch.inf)
    outside[vocabulary.image_start : vocabulary.text_start] = 0

    class OnlyImage(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores + outside

    conditional, unconditional = (torch.from_numpy(p.tokens)[None].expand(candidates, -1) for p in guidance_streams(model))
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0}
    found = opt.generate(  # type: ignore[operator]
        input_ids=conditional, attention_mask=torch.ones_like(conditional), guidance_scale=GUIDANCE,
        negative_prompt_ids=unconditional, negative_prompt_attention_mask=torch.ones_like(unconditional),
        max_new_tokens=vocabulary.tokens_per_image, min_new_tokens=vocabulary.tokens_per_image, eos_token_id=None, pad_token_id=0,
        logits_processor=LogitsProcessorList([OnlyImage()]), **sampling,
    )  # fmt: skip
    return found[:, conditional.shape[1] :].numpy() - vocabulary.image_start


def seconds(run: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def bandwidth() -> float:
    """Memory bandwidth, bytes a second: a sum over a gibibyte, the best of ten."""
    data = torch.ones(1 << 28, device=DEVICE)

    def read() -> None:
        data.sum().item()

    return data.nbytes / min(seconds(read) for _ in range(10))


def floor_seconds(model: Decoder) -> float:
    """Seconds to read once the weights that a step needs: those of the blocks and the image rows of the output matrix."""
    rows = model.tokens.weight[model.vocabulary.image_start : model.vocabulary.text_start]
    return (sum(p.nbytes for p in model.blocks.parameters()) + rows.nbytes) / bandwidth()


def compare(shape: str, tokens: int | None, rounds: int, compiled: bool) -> None:
    """Print images a second of both, their ratio, and our time a token with its floor.

    Raises:
        SystemExit: if there is a GPU, which OPT would not use, or the greedy images differ.
    """
    if DEVICE.type != "cpu":
        raise SystemExit("this comparison is one of CPUs: hide the GPU (CUDA_VISIBLE_DEVICES=), or measure ours with --alone")
    model = make_model(shape, tokens)
    model.compiled_decoding = compiled
    opt, floor = opt_of(model), floor_seconds(model)
    if not compiled:
        model.pack()  # as a generator does with what it loads
    same = has_options(model) or np.array_equal(ours(model, CANDIDATES, temperature=0.0), theirs(opt, model, CANDIDATES, greedy=True))
    if not same:
        raise SystemExit("the greedy images differ")
    taken: dict[str, list[float]] = {"ours": [], "opt": []}
    for _ in range(rounds):
        taken["ours"].append(seconds(lambda: ours(model, CANDIDATES)))
        taken["opt"].append(seconds(lambda: theirs(opt, model, CANDIDATES, greedy=False)))
    fast, slow = (statistics.median(found) for found in taken.values())
    steps = model.vocabulary.tokens_per_image
    print(
        "| shape | tokens an image | ours, images/s | OPT, images/s | ratio | ours, ms a token | floor, ms |\n|---|---|---|---|---|---|---|"
    )
    print(
        f"| {shape} | {steps} | {CANDIDATES / fast:.3f} | {CANDIDATES / slow:.3f} | {slow / fast:.2f} | {fast / steps * 1e3:.2f} | "
        f"{floor * 1e3:.2f} |"
    )


def alone(shape: str, tokens: int | None, compiled: bool) -> None:
    """Print our seconds and throughput for several images at once, with guidance."""
    model = make_model(shape, tokens or (None if shape == "small" else 1024))
    model.compiled_decoding = compiled
    floor = floor_seconds(model) * model.vocabulary.tokens_per_image
    if not compiled:
        model.pack()
    print(f"{shape}, {model.vocabulary.tokens_per_image} tokens, floor {floor:.2f} s")
    print("| images | seconds | images/s | times the floor |\n|---|---|---|---|")
    for count in (1, 4, 16, 64):
        ours(model, count)
        took = seconds(partial(ours, model, count))
        print(f"| {count} | {took:.2f} | {count / took:.2f} | {took / floor:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=["small", *SHAPES], default="small")
    parser.add_argument("--tokens", type=int, help="tokens an image; by default the shape's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    if options.alone:
        alone(options.shape, options.tokens, options.compiled)
    else:
        compare(options.shape, options.tokens, options.rounds, options.compiled)
