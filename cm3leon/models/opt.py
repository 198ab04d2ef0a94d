"""A decoder as a checkpoint of Hugging Face's OPT, and back.

    export_opt(Decoder.load(Path("models/pretrained")), Path("opt"))   # transformers.OPTForCausalLM.from_pretrained("opt")
    decoder = import_opt(Path("opt"))

The decoder is OPT (arXiv 2205.01068) without biases and without learnable norms. OPT's configuration has switches for both
(``enable_bias``, ``layer_norm_elementwise_affine``), so the two models compute the same. The files differ in three ways: OPT has separate
matrices for queries, keys and values, its learned positions start at row 2, and its tensors have other names. ``transformers`` is not
needed here, and nothing is pickled.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cm3leon.config.renamed import current_names
from cm3leon.models.decoder import Decoder, DecoderSpec
from cm3leon.sequence.grammar import EOS, PAD, Vocabulary
from cm3leon.utils.errors import UserError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

OWN = "cm3leon"
"""Key in OPT's configuration of a copy of the decoder's own ``config.json``; transformers reads and writes it unchanged."""

OFFSET = 2
"""Rows of OPT's position embeddings before that of the first token: row 1 is for padding, row 0 is not used."""

TOKENS, POSITIONS, HEAD = "model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight", "lm_head.weight"
FUSED, PROJECTIONS = "attention.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MATRICES = {"attention.out": "self_attn.out_proj", "up": "fc1", "down": "fc2"}
"""Matrices of a block except the fused one, ours -> OPT's."""

SIZES = {"layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads", "context": "max_position_embeddings"}
"""Fields of :class:`DecoderSpec` -> OPT's."""

FIXED: dict[str, tuple[Any, Any, str]] = {
    "model_type": ("opt", None, "only OPT models can be read"),
    "enable_bias": (False, True, "the decoder has no biases"),
    "layer_norm_elementwise_affine": (False, True, "the decoder's norms have no parameters"),
    "do_layer_norm_before": (True, True, "the decoder's norms come first in a block"),
    "_remove_final_layer_norm": (False, False, "the decoder has a final norm"),
    "activation_function": ("relu", "relu", "the decoder's feed-forward has no other activation"),
    "tie_word_embeddings": (True, True, "the decoder's output matrix is its token embedding"),
}
"""OPT's field -> required value, OPT's default if it is absent, and the reason. Dropout may have any value: it only affects training."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class OPTFormatError(UserError):
    """A decoder that OPT cannot express, or a checkpoint that is no such OPT; the message names the field or tensor."""


def export_opt(model: Decoder, directory: Path) -> None:
    """Write ``config.json``, ``generation_config.json`` and ``model.safetensors`` for ``OPTForCausalLM``, in the model's own precision.

    Raises:
        OPTFormatError: if the decoder has an option that OPT lacks, such as ``image_positions`` or ``qk_norm``.
    """
    _check_expressible(model.spec)
    weights = _to_opt({name: weight.detach().cpu() for name, weight in model.state_dict().items()}, model.spec.layers)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, directory / WEIGHTS, metadata={"format": "pt"})
    special = {"pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}  # <eos> opens a sequence too
    _write(directory / CONFIG, {**_config(model), **special})
    _write(directory / "generation_config.json", special)


def import_opt(directory: Path, vocabulary: Vocabulary | None = None) -> Decoder:
    """Read what :func:`export_opt` or transformers' ``save_pretrained`` wrote, in one file or several, as a float32 decoder in eval mode.

    Args:
        vocabulary: layout of the token ids, if the checkpoint's configuration does not have it.

    Raises:
        FileNotFoundError: if the directory holds no checkpoint.
        OPTFormatError: if the checkpoint is not an OPT that a decoder can express, or is pickled.
    """
    directory = Path(directory)
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: no OPT checkpoint here, {CONFIG} is missing")
    config = _read_json(path)
    spec, vocabulary = _check_config(config, vocabulary, path)
    weights = _read_weights(directory)
    head = weights.pop(HEAD, None)  # some programs save the output matrix although it is tied
    if head is not None and not (TOKENS in weights and torch.equal(head, weights[TOKENS])):
        raise OPTFormatError(f"{directory}: {HEAD} differs from {TOKENS}; {FIXED['tie_word_embeddings'][2]}")
    _check_weights(weights, _shapes(spec, vocabulary), directory)
    model = Decoder(spec, vocabulary)
    model.load_state_dict(_from_opt(weights, spec.layers))
    return model.eval()


# --- configuration ---------------------------------------------------------------------------------------------------


def _config(model: Decoder) -> dict[str, Any]:
    spec = model.spec
    return {
        "architectures": ["OPTForCausalLM"],
        **{field: value for field, (value, _, _) in FIXED.items()},
        **{theirs: getattr(spec, ours) for ours, theirs in SIZES.items()},
        "vocab_size": model.vocabulary.size,
        "word_embed_proj_dim": spec.width,
        "ffn_dim": 4 * spec.width,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "init_std": spec.init_std,
        "torch_dtype": str(model.tokens.weight.dtype).removeprefix("torch."),
        OWN: {"decoder": asdict(spec), "vocabulary": asdict(model.vocabulary)},
    }


def _check_expressible(spec: DecoderSpec) -> None:
    """Require every option that changes what is computed to be off; these are the boolean fields."""
    on = [field.name for field in fields(spec) if getattr(spec, field.name) is True]
    if on:
        found = ", ".join(f"{name}=true" for name in on)
        needed = " ".join(f"--set pretrain.model.{name}=false" for name in on)
        raise OPTFormatError(
            f"OPT cannot express a decoder with {found}; export it with --format transformers, or train one without: "
            f"cm3leon configure PROFILE {needed}"
        )


def _check_config(config: dict[str, Any], vocabulary: Vocabulary | None, path: Path) -> tuple[DecoderSpec, Vocabulary]:
    """The architecture and vocabulary of the decoder for a checkpoint; ``path`` is its configuration's, for errors."""

    def unsuitable(field: str, found: object, needed: object, reason: str) -> OPTFormatError:
        return OPTFormatError(f"{path}: {field} is {json.dumps(found)}, needed is {json.dumps(needed)}: {reason}")

    # 1. Switches: OPT must compute what the decoder computes.
    for field, (needed, default, reason) in FIXED.items():
        found = config.get(field, default)
        if found != needed:
            raise unsuitable(field, found, needed, reason)
    architectures = config.get("architectures") or ["OPTForCausalLM"]
    if architectures != ["OPTForCausalLM"]:
        raise unsuitable("architectures", architectures, ["OPTForCausalLM"], "the decoder is a language model")
    # 2. Sizes.
    for field in (*SIZES.values(), "vocab_size", "ffn_dim"):
        if type(config.get(field)) is not int or config[field] < 1:
            raise OPTFormatError(f"{path}: {field} must be a positive integer, found {json.dumps(config.get(field))}")
    sizes = {ours: config[theirs] for ours, theirs in SIZES.items()}
    width, projected = sizes["width"], config.get("word_embed_proj_dim")
    if projected not in (None, width):
        raise unsuitable("word_embed_proj_dim", projected, width, "the decoder's embeddings have the decoder's width")
    if config["ffn_dim"] != 4 * width:
        raise unsuitable("ffn_dim", config["ffn_dim"], 4 * width, "the decoder's feed-forward is four times its width")
    if width % sizes["heads"]:
        raise OPTFormatError(f"{path}: hidden_size {width} is not a multiple of num_attention_heads {sizes['heads']}")
    # 3. The copy of the decoder's own configuration, if there is one.
    return _check_own(config, sizes, vocabulary, path)


def _check_own(config: dict[str, Any], sizes: dict[str, int], vocabulary: Vocabulary | None, path: Path) -> tuple[DecoderSpec, Vocabulary]:
    """The architecture and vocabulary under :data:`OWN`, which must agree with OPT's fields; without it, those of the arguments."""
    own = config.get(OWN)
    begun = {"init_std": 0.006, "position_std": 0.0002}  # the paper's; the weights are read, so neither is used
    spec = DecoderSpec(**sizes, **begun, qk_norm=False, image_positions=False, rope=False, previous_token=False)  # type: ignore[arg-type]
    if own is not None:
        try:
            spec = DecoderSpec(**current_names(own["decoder"], "pretrain.model"))
            stored = Vocabulary(**own["vocabulary"])
        except (KeyError, TypeError) as error:
            raise OPTFormatError(f"{path}: {OWN} has no decoder and vocabulary that this version can read ({error})") from None
        _check_expressible(spec)
        for ours, theirs in SIZES.items():
            if getattr(spec, ours) != sizes[ours]:
                raise OPTFormatError(f"{path}: {theirs} is {sizes[ours]}, but {OWN}.decoder.{ours} is {getattr(spec, ours)}")
        if vocabulary not in (None, stored):
            raise OPTFormatError(f"{path}: the checkpoint has the vocabulary {stored}, not {vocabulary}")
        vocabulary = stored
    if vocabulary is None:
        raise OPTFormatError(f"{path}: no key {OWN}, which has the layout of the vocabulary; give it with --vocabulary")
    if vocabulary.size != config["vocab_size"]:
        raise OPTFormatError(f"{path}: vocab_size is {config['vocab_size']}, but the vocabulary has {vocabulary.size} ids: {vocabulary}")
    return spec, vocabulary


# --- tensors ---------------------------------------------------------------------------------------------------------


def _to_opt(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A decoder's tensors under OPT's names, the fused matrix divided into queries, keys and values."""
    left = dict(weights)
    positions_CD = left.pop("positions.weight")
    unused = positions_CD.new_zeros(OFFSET, positions_CD.shape[1])
    opt = {TOKENS: left.pop("tokens.weight"), POSITIONS: torch.cat([unused, positions_CD])}
    for layer in range(layers):
        ours, theirs = _prefixes(layer)
        for name, weight in zip(PROJECTIONS, left.pop(f"{ours}{FUSED}.weight").chunk(3), strict=True):
            opt[f"{theirs}{name}.weight"] = weight
        for name, their_name in MATRICES.items():
            opt[f"{theirs}{their_name}.weight"] = left.pop(f"{ours}{name}.weight")
    assert not left, f"tensors of the decoder that OPT has no name for: {', '.join(left)}"
    return opt


def _from_opt(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The inverse of :func:`_to_opt`."""
    own = {"tokens.weight": weights[TOKENS], "positions.weight": weights[POSITIONS][OFFSET:]}
    for layer in range(layers):
        ours, theirs = _prefixes(layer)
        own[f"{ours}{FUSED}.weight"] = torch.cat([weights[f"{theirs}{name}.weight"] for name in PROJECTIONS])
        own |= {f"{ours}{name}.weight": weights[f"{theirs}{their_name}.weight"] for name, their_name in MATRICES.items()}
    return own


def _prefixes(layer: int) -> tuple[str, str]:
    """Beginnings of the names of a block's tensors, ours and OPT's."""
    return f"blocks.{layer}.", f"model.decoder.layers.{layer}."


def _shapes(spec: DecoderSpec, vocabulary: Vocabulary) -> dict[str, tuple[int, ...]]:
    """OPT's tensors and their shapes."""
    width = spec.width
    shapes: dict[str, tuple[int, ...]] = {TOKENS: (vocabulary.size, width), POSITIONS: (spec.context + OFFSET, width)}
    feed_forward = {"fc1": (4 * width, width), "fc2": (width, 4 * width)}
    for layer in range(spec.layers):
        for name in (*PROJECTIONS, *MATRICES.values()):
            shapes[f"{_prefixes(layer)[1]}{name}.weight"] = feed_forward.get(name, (width, width))
    return shapes


def _check_weights(weights: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], directory: Path) -> None:
    if missing := [name for name in shapes if name not in weights]:
        raise OPTFormatError(f"{directory}: {_named(missing)} missing from the checkpoint")
    if unknown := sorted(set(weights) - set(shapes)):
        raise OPTFormatError(f"{directory}: {_named(unknown)} in the checkpoint, which the decoder does not have")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise OPTFormatError(f"{directory}: {name} has shape {tuple(weights[name].shape)}, needed is {shape}")
        if weights[name].dtype not in DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise OPTFormatError(f"{directory}: {name} is {str(weights[name].dtype).removeprefix('torch.')}, allowed are {allowed}")


def _named(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


# --- files -----------------------------------------------------------------------------------------------------------


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise OPTFormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise OPTFormatError(f"{path}: expected a mapping, found {type(value).__name__}")
    return value


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, from its one file or from the files that its index names."""
    files = [WEIGHTS]
    if not (directory / WEIGHTS).is_file():
        if not (directory / INDEX).is_file():
            _refuse_pickle(directory)
            raise FileNotFoundError(f"{directory}: no weights here, {WEIGHTS} is missing")
        listed = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) and Path(name).name == name for name in listed.values()):
            raise OPTFormatError(f"{directory / INDEX}: weight_map must name a file of this directory for each tensor")
        files = sorted(set(listed.values()))
    weights: dict[str, Tensor] = {}
    for name in files:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name} is missing; {INDEX} names it")
        try:
            weights |= load_file(directory / name)
        except SafetensorError as error:
            raise OPTFormatError(f"{directory / name} is not a complete safetensors file: {error}") from None
    return weights


def _refuse_pickle(directory: Path) -> None:
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise OPTFormatError(
            f"{directory}: the weights are in {pickled[0]}, a pickle, which can run code and is never read here; save them as safetensors: "
            f'OPTForCausalLM.from_pretrained("{directory}").save_pretrained("NEW") with transformers'
        )
