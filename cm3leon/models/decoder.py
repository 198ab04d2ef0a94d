"""The decoder: one causal transformer over text and image tokens.

OPT's architecture with the paper's changes (arXiv 2309.02591, section 3): pre-norm, ReLU feed-forward of four times the width, learned
absolute positions, no biases, no learnable LayerNorm parameters, tied embeddings; truncated-normal initialization, output layers zero.

Four options are not in the paper and off in its profiles. With them a small model learns in minutes what takes it hours otherwise
(docs/log.md):

- ``image_positions`` adds an embedding of a token's raster index in its image, otherwise known only as the distance from the break.
- ``rope`` is a rotary embedding over sequence positions and over the rows and columns of an image.
- ``previous_token`` adds a linear map of the previous token's embedding, so that a noun is read together with its adjective.
- ``qk_norm`` normalizes queries and keys (Henry et al. 2020).

Shapes: B batch, T tokens, D width, H heads, K head dim, E raster indices of an image, C context, N targets, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cm3leon.config.renamed import current_names
from cm3leon.models.cross_entropy import chunked_cross_entropy
from cm3leon.models.kernels import (
    ROWS_MULTIPLE,
    apply_rotary_emb,
    attention,
    convolves,
    linear,
    pack_weight,
    packed_linear,
    packing_pays,
    relu,
)
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.utils.files import read_file, read_json

if TYPE_CHECKING:
    from cm3leon.config.schema import ModelConfig
    from cm3leon.data.batches import Batch

WEIGHTS = "model.safetensors"
MADE_BY = "make run"
RENAMED_TENSORS = {"places.weight": "image_positions.weight"}
"""Names of tensors in files of earlier versions, and their present names."""


@dataclass(frozen=True)
class DecoderSpec:
    """Architecture of a decoder, without defaults of its own; stored with its vocabulary next to the weights as ``config.json``."""

    layers: int
    width: int
    heads: int
    context: int
    init_std: float
    position_std: float
    qk_norm: bool
    image_positions: bool
    rope: bool
    previous_token: bool

    @classmethod
    def from_config(cls, config: ModelConfig) -> DecoderSpec:
        """The shape that the parameters describe."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


class Cache(Protocol):
    """Keys and values of the tokens that precede a forward pass."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of new tokens to the cached ones and to each other, (B, H, T, K); adds their keys and values to the cache.

        Attention logits are ``scale * q . k``.
        """


MAX_ROPE_FREQUENCY = 1.5
"""Angle per position, row or column of a head's fastest rotating pair, radians."""

MAX_ATTENTION_LOGIT = 11.0
"""Attention logit of parallel queries and keys under ``qk_norm``: ``log2(n**2 - n)`` for n = 50 keys (Henry et al. 2020, arXiv 2010.04245).

With sqrt(K), which is 5.7 for heads of 32, small heads cannot attend to a single token; with twice as much they learn more slowly
(docs/log.md).
"""


class RotaryEmbedding(nn.Module):
    """RoPE (RoFormer, arXiv 2104.09864) over positions and over the rows and columns of an image, for three quarters of each head.

    A head's K / 2 pairs are divided into four groups of K / 8, rotated by row, by column, by sequence position, and not at all.
    A key is rotated by the row and column of its own token, a query by those of the *next* token, the one to be predicted: the relative
    angle is then zero for the same raster index in another image, which is what copying from a source or condition image needs.
    Tokens that belong to no image have the angles of raster index 0, which are zero.
    """

    def __init__(self, head_dim: int, tokens_per_image: int, context: int) -> None:
        super().__init__()
        side = math.isqrt(tokens_per_image)
        if side**2 != tokens_per_image or head_dim % 8:
            raise ValueError(f"rope needs square images and head dims that are multiples of 8, found {tokens_per_image} and {head_dim}")
        raster_E = torch.arange(tokens_per_image)
        pairs = head_dim // 8
        image_angles_EP = torch.cat([_angles(raster_E // side, pairs, side), _angles(raster_E % side, pairs, side)], 1)
        angles_CP = torch.cat([_angles(torch.arange(context), pairs, context), torch.zeros(context, pairs)], 1)
        # Image positions count from 1, 0 for tokens of no image. A query takes the next token's raster index, hence the shift by one.
        tables = {
            "keys": torch.cat([image_angles_EP[:1], image_angles_EP]),
            "queries": torch.cat([image_angles_EP, image_angles_EP[:1]]),
            "positions": angles_CP,
        }
        for name, angles in tables.items():
            self.register_buffer(name, torch.stack([angles.cos(), angles.sin()], -1), persistent=False)

    def forward(self, image_positions_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """``cos_sin`` (B, T, 2, 1, K / 2, 2): cosine and sine of each pair's angle, for queries and for keys."""
        positions = self.get_buffer("positions")[positions_BT].expand(*image_positions_BT.shape, -1, -1)
        both = [torch.cat([self.get_buffer(name)[image_positions_BT], positions], -2) for name in ("queries", "keys")]
        return torch.stack(both, 2).unsqueeze(3)


def _angles(steps_N: Tensor, pairs: int, longest: int) -> Tensor:
    """Angles (N, pairs): geometric frequencies from :data:`MAX_ROPE_FREQUENCY` for the first pair down to 1 / ``longest`` of it."""
    # The device by name: where transformers has loaded a model, a surrounding ``torch.device("meta")`` no longer reaches linspace.
    exponents = torch.linspace(0, 1, pairs, device=steps_N.device)
    return steps_N[:, None] * (MAX_ROPE_FREQUENCY * float(longest) ** -exponents)


class Linear(nn.Linear):
    """A linear layer without bias; ``zero``: the decoder initializes it with zeros."""

    def __init__(self, inputs: int, outputs: int, *, zero: bool = False) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.zero = zero

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)


class Int8Linear(nn.Module):
    """A :class:`Linear` for inference with 8-bit integer weights and one scale per output row (absmax quantization)."""

    def __init__(self, matrix: Linear) -> None:
        super().__init__()
        weight = matrix.weight.detach().float()
        scale_O1 = (weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127).to(matrix.weight.dtype)
        # Divided by the scale as rounded to the weight's dtype, by which it is multiplied again.
        self.register_buffer("weight", (weight / scale_O1.float()).round().to(torch.int8))
        self.register_buffer("scale", scale_O1[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.get_buffer("weight").to(x.dtype)) * self.get_buffer("scale")


class PackedLinear(nn.Module):
    """A :class:`Linear` for inference in float32 on a CPU, whose weight lies in memory as oneDNN reads it."""

    def __init__(self, matrix: Linear) -> None:
        super().__init__()
        self.packed = pack_weight(matrix.weight.detach())

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.packed)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        self.heads, self.layer, self.qk_norm, self.context = spec.heads, layer, spec.qk_norm, spec.context
        self.qkv = Linear(spec.width, 3 * spec.width)
        self.out = Linear(spec.width, spec.width, zero=True)

    def forward(self, x_BTD: Tensor, cache: Cache | None, cos_sin: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        batch, length, width = x_BTD.shape
        qk, v = self.qkv(x_BTD).contiguous().view(batch, length, 3, self.heads, -1).split([2, 1], 2)
        size = v.shape[-1]
        if self.qk_norm:
            qk = F.layer_norm(qk.float(), (size,))
        if cos_sin is not None:
            qk = apply_rotary_emb(qk, cos_sin)
        q, k, v = (y.transpose(1, 2) for y in (*qk.unbind(2), v.squeeze(2)))
        scale = MAX_ATTENTION_LOGIT / size if self.qk_norm else size**-0.5
        if cache is None:
            y_BHTK = attention(q, k, v, scale, cu_seqlens, self.context)
        else:
            y_BHTK = cache.attend(self.layer, q.to(v.dtype), k.to(v.dtype), v, scale)
        return self.out(y_BHTK.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, both residual."""

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        self.attention = Attention(spec, layer)
        self.up = Linear(spec.width, 4 * spec.width)
        self.down = Linear(4 * spec.width, spec.width, zero=True)

    def forward(self, x_BTD: Tensor, cache: Cache | None, cos_sin: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        x_BTD = x_BTD + self.attention(F.layer_norm(x_BTD, x_BTD.shape[-1:]), cache, cos_sin, cu_seqlens)
        return x_BTD + self.down(relu(self.up(F.layer_norm(x_BTD, x_BTD.shape[-1:]))))


class Decoder(nn.Module):
    """Token ids (B, T) to hidden states (B, T, D); :meth:`logits` projects those to the vocabulary or a slice of it.

    Attributes:
        recompute: activation checkpointing: blocks keep only their inputs and run again in the backward pass.
        compiled_decoding: cached decoding runs compiled, which pays off on a GPU.
        compute_dtype: of keys and values; None: that of the parameters. A model sharded by FSDP holds its parameters in float32 and
            computes in the precision of the run.
    """

    def __init__(self, spec: DecoderSpec, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.spec, self.vocabulary = spec, vocabulary
        self.tokens = nn.Embedding(vocabulary.size, spec.width)
        self.positions = nn.Embedding(spec.context, spec.width)
        self.image_positions = nn.Embedding(1 + vocabulary.tokens_per_image, spec.width, padding_idx=0) if spec.image_positions else None
        self.previous = Linear(spec.width, spec.width) if spec.previous_token else None
        self.rope = RotaryEmbedding(spec.width // spec.heads, vocabulary.tokens_per_image, spec.context) if spec.rope else None
        self.blocks = nn.ModuleList(Block(spec, layer) for layer in range(spec.layers))
        self.recompute = False
        self.compiled_decoding = False
        self.compute_dtype: torch.dtype | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal truncated at three standard deviations; attention output and second feed-forward projection zero (paper, section 3.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                self._initialize(module, module.weight)

    def _initialized(self, module: nn.Linear | nn.Embedding) -> Tensor:
        """A new weight for one of the decoder's modules."""
        weight = torch.empty(module.weight.shape)
        self._initialize(module, weight)
        return weight

    @torch.no_grad()
    def _initialize(self, module: nn.Module, weight: Tensor) -> None:
        """Fill the weight of one of the decoder's modules."""
        std = self.spec.position_std if module is self.positions else self.spec.init_std
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
        if module is self.image_positions:
            weight[:1] = 0
        if isinstance(module, Linear) and module.zero:
            weight.zero_()

    def initial_weights(self, read_codebook: Callable[[], Tensor] | None = None, std: float = 0.0) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each parameter as a new decoder of this shape would get it, from the same draws; one at a time is in memory.

        For a decoder on the meta device. The embeddings of tokens come last.

        Args:
            read_codebook, std: the arguments of :meth:`start_from_codebook`; None: image tokens start like all others.
        """
        modules = {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
        for module in modules.values():  # their constructors draw, too, before the decoder initializes them
            out, inputs = module.weight.shape
            nn.Linear(inputs, out, bias=False) if isinstance(module, nn.Linear) else nn.Embedding(out, inputs)
        tokens = self._initialized(self.tokens)
        for name, module in modules.items():
            if module is not self.tokens:
                yield f"{name}.weight", self._initialized(module)
        if read_codebook is not None:
            tokens[self.vocabulary.image_start : self.vocabulary.text_start] = self._codebook_embeddings(read_codebook(), std)
        yield "tokens.weight", tokens

    @torch.no_grad()
    def start_from_codebook(self, entries_ED: Tensor, std: float) -> None:
        """Initialize the embeddings of image tokens from the image tokenizer's codebook, whitened and projected to width D at random.

        Codes that look alike then start with similar embeddings, in the input and, as these are tied, in the output: what is learned about
        one transfers to the others.

        Args:
            std: standard deviation of the embeddings' elements.
        """
        start, stop = self.vocabulary.image_start, self.vocabulary.text_start
        self.tokens.weight[start:stop] = self._codebook_embeddings(entries_ED, std)

    def _codebook_embeddings(self, entries_ED: Tensor, std: float) -> Tensor:
        centered = entries_ED - entries_ED.mean(0)
        whitened, _, _ = torch.linalg.svd(centered, full_matrices=False)
        projection = nn.init.orthogonal_(torch.empty(whitened.shape[1], self.spec.width))
        vectors = whitened @ projection
        return vectors * (std / vectors.std())

    def forward(
        self,
        tokens_BT: Tensor,
        image_positions_BT: Tensor,
        cache: Cache | None = None,
        positions_BT: Tensor | None = None,
        previous_BT: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) after the last norm.

        Args:
            image_positions_BT: raster index of each token in its image, from 1; 0 for tokens of no image. Used by ``image_positions`` and
                ``rope``.
            cache: keys and values of earlier tokens; it also masks attention.
            positions_BT: sequence positions, by default counted from 0.
            previous_BT: the token before each one, by default its left neighbor in the row; position 0 has none. Used by
                ``previous_token``.
            cu_seqlens: where packed samples begin (see :class:`~cm3leon.data.batches.Batch`); with ``positions_BT`` and without a cache.

        Raises:
            ValueError: if the sequence is longer than the context.
        """
        if cu_seqlens is None and tokens_BT.shape[1] > self.spec.context:
            raise ValueError(f"sequence of {tokens_BT.shape[1]} tokens is longer than the context of {self.spec.context}")
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.tokens(tokens_BT)
        if self.previous is not None:
            # While decoding, the left neighbor is in the cache and not in the row, so the caller passes it.
            before_BTD = F.pad(x_BTD[:, :-1], (0, 0, 1, 0)) if previous_BT is None else self.tokens(previous_BT)
            x_BTD = x_BTD + self.previous(before_BTD * (positions_BT > 0).unsqueeze(-1))
        x_BTD = x_BTD + self.positions(positions_BT)
        if self.image_positions is not None:
            x_BTD = x_BTD + self.image_positions(image_positions_BT)
        cos_sin = None if self.rope is None else self.rope(image_positions_BT, positions_BT)
        for block in self.blocks:
            # Without a graph there is nothing to recompute for, and checkpoint() warns.
            if self.recompute and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, cache, cos_sin, cu_seqlens, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, cache, cos_sin, cu_seqlens)
        return F.layer_norm(x_BTD, x_BTD.shape[-1:])

    def quantize(self) -> None:
        """Replace the linear layers of the blocks by :class:`Int8Linear`, a quarter of float32's memory; for inference only."""
        self._replace(Int8Linear, lambda matrix: True)

    def pack(self) -> None:
        """Replace those linear layers of the blocks by :class:`PackedLinear` that are faster so, if there are any; for inference only."""
        self._replace(PackedLinear, lambda matrix: packing_pays(matrix.weight))

    def _replace(self, kind: Callable[[Linear], nn.Module], chosen: Callable[[Linear], bool]) -> None:
        for block in self.blocks:
            for module in list(block.modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, Linear) and chosen(child):
                        setattr(module, name, kind(child))

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits of the ids in ``[start, stop)``, (..., stop - start)."""
        return linear(hidden, self.tokens.weight[start:stop])

    def losses(self, batch: Batch, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        """Next-token cross-entropy of a batch, nats: the weighted sum, differentiable, and each token's loss (B, T), 0 if it is no target.

        Args:
            z_loss: see :func:`~cm3leon.models.cross_entropy.chunked_cross_entropy`.
        """
        shape = batch.tokens.shape
        if batch.cu_seqlens is not None and convolves(self.device):
            batch = batch.filled_up(ROWS_MULTIPLE)
        hidden_BTD = self(batch.tokens, batch.image_positions, positions_BT=batch.positions, cu_seqlens=batch.cu_seqlens)
        # Only targets go through the vocabulary's product, the largest of a step. Each is predicted from the token before it.
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, batch.targets - 1)
        tokens_N, weights_N = batch.tokens.flatten()[batch.targets], batch.weights.flatten()[batch.targets]
        total, losses_N = chunked_cross_entropy(hidden_ND, self.tokens.weight, tokens_N, weights_N, z_loss)
        losses_BT = torch.zeros(batch.tokens.shape, device=losses_N.device)
        losses_BT.view(-1)[batch.targets] = losses_N
        return total, losses_BT[:, : shape[1]]

    @property
    def parameter_count(self) -> int:
        """Of a decoder that is neither quantized nor packed."""
        return sum(p.numel() for p in self.parameters())

    @property
    def device(self) -> torch.device:
        return self.tokens.weight.device

    def save(self, directory: Path, tensors: dict[str, Tensor] | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``; ``tensors`` are the full parameters of a sharded model."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {"decoder": asdict(self.spec), "vocabulary": asdict(self.vocabulary)}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in (tensors or self.state_dict()).items()}, directory / WEIGHTS)

    @classmethod
    def load(cls, directory: Path, device: str | torch.device = "cpu") -> Decoder:
        """Read what :meth:`save` wrote; on the device ``meta`` without the weights (:func:`stored_weights`).

        Raises:
            FileNotFoundError: if the directory holds no decoder.
            DamagedFileError: if a file of it is truncated.
        """
        directory = Path(directory)
        if not (directory / WEIGHTS).is_file():
            raise FileNotFoundError(f"{directory}: no decoder here; run the pipeline ({MADE_BY}) or: cm3leon pretrain")
        config = read_file(directory / "config.json", read_json, MADE_BY)
        on_meta = torch.device(device).type == "meta"
        with torch.device("meta") if on_meta else nullcontext():
            model = cls(DecoderSpec(**current_names(config["decoder"], "pretrain.model")), Vocabulary(**config["vocabulary"]))
        if on_meta:
            return model
        tensors = read_file(directory / WEIGHTS, load_file, MADE_BY)
        model.load_state_dict({RENAMED_TENSORS.get(name, name): tensor for name, tensor in tensors.items()})
        return model.to(device).eval()


def stored_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each parameter that :meth:`Decoder.save` wrote; one at a time is in memory.

    Raises:
        DamagedFileError: if the file is truncated.
    """
    with read_file(directory / WEIGHTS, lambda path: safe_open(path, "pt"), MADE_BY) as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            yield RENAMED_TENSORS.get(name, name), file.get_tensor(name)
