"""The decoder: one causal transformer over text and image tokens.

OPT's layout with the paper's changes (arXiv 2309.02591, section 3): pre-norm, ReLU feed-forward of four widths, learned absolute
positions, no biases, no learnable LayerNorm parameters, tied embeddings; truncated-normal initialisation, output layers zero.
Not in the paper, and off in its presets, three options by which a small model soon learns what it would else need long for:
``image_positions`` adds to an image token the embedding of its place in the image, instead of counting from the break; ``rope`` lets
attention tell how far apart two tokens stand, and which stand at the same place of two images; ``previous_token`` adds to a token the one
before it, turned by a matrix, so that a noun is read with its adjective.
Shapes: B batch, T tokens, D width, H heads, K head dim, V vocabulary.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cm3leon.config.schema import ModelConfig, current_names
from cm3leon.models.cross_entropy import chunked_cross_entropy
from cm3leon.models.kernels import attention, linear, relu, turn
from cm3leon.sequence.grammar import Vocabulary


@dataclass(frozen=True)
class DecoderSpec:
    """Shape of a decoder, without defaults of its own; stored with its vocabulary beside the weights as ``config.json``."""

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
    """Keys and values of tokens before those of a forward pass."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of new tokens, (B, H, T, K) each and so the result, to those held and to one another; keeps what they bring.

        Logits are ``scale * q . k``.
        """


FASTEST_TURN = 1.5
"""Radians by which a step to the next row, column or position turns the fastest pair of a head."""

SHARPEST_LOGIT = 11.0
"""Of attention with ``qk_norm``, where a query and a key have one direction: what Henry et al. (2020, arXiv 2010.04245) derive for fifty
keys, ``log2(50**2 - 50)``. At the square root of the heads' size small heads cannot single a token out, at twice as much they learn more
slowly (docs/log.md)."""


def block_causal(samples_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention bias (B, 1, T, T), 0 or -inf: each token sees itself and what is before it in its own sample.

    In the dtype that attention is computed in, so that all blocks share one; of booleans each would make and keep a copy of its own.
    """
    same = samples_BT[:, :, None] == samples_BT[:, None, :]
    bias = torch.zeros(same.shape, dtype=dtype, device=samples_BT.device)
    return bias.masked_fill_(~same.tril(), -torch.inf).unsqueeze(1)


class Rotation(nn.Module):
    """Rotary embedding (RoFormer, arXiv 2104.09864) of three quarters of each head: a half by places in an image, a quarter by positions.

    By its place a key is turned by its row and column, a query by those of the token that comes next, whose place the model knows: what is
    found at no turn between the two is the same place in another image. What is no image token is turned as the first place of an image is,
    not at all. By its position every token is turned the same, as query and as key.
    """

    def __init__(self, head_dim: int, tokens_per_image: int, context: int) -> None:
        super().__init__()
        side = math.isqrt(tokens_per_image)
        if side**2 != tokens_per_image or head_dim % 8:
            raise ValueError(f"rope needs square images and heads of a multiple of 8, found {tokens_per_image} and {head_dim}")
        index = torch.arange(tokens_per_image)
        pairs = head_dim // 8  # for rows, for columns, for positions, and as many that are not turned
        of_places_NE = torch.cat([_angles(index // side, pairs, side), _angles(index % side, pairs, side)], 1)
        of_positions_CE = torch.cat([_angles(torch.arange(context), pairs, context), torch.zeros(context, pairs)], 1)
        tables = {
            "keys": torch.cat([of_places_NE[:1], of_places_NE]),
            "queries": torch.cat([of_places_NE, of_places_NE[:1]]),
            "positions": of_positions_CE,
        }
        for name, angles in tables.items():
            self.register_buffer(name, torch.stack([angles.cos(), angles.sin()], -1), persistent=False)

    def forward(self, places_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Turns (B, T, 2, 1, K / 2, 2) of queries and of keys: cosine and sine for each pair of numbers."""
        of_positions = self.get_buffer("positions")[positions_BT].expand(*places_BT.shape, -1, -1)
        both = [torch.cat([self.get_buffer(name)[places_BT], of_positions], -2) for name in ("queries", "keys")]
        return torch.stack(both, 2).unsqueeze(3)


def _angles(steps_N: Tensor, pairs: int, longest: int) -> Tensor:
    """Angles (N, pairs) of so many steps: the first pair turns by :data:`FASTEST_TURN` a step, the last ``longest`` times less."""
    return steps_N[:, None] * (FASTEST_TURN * float(longest) ** -torch.linspace(0, 1, pairs))


class Linear(nn.Linear):
    """A matrix without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)


class Int8Linear(nn.Module):
    """A :class:`Linear` for inference whose weight is held as 8-bit integers, with a scale for each output."""

    def __init__(self, matrix: Linear) -> None:
        super().__init__()
        scale_O1 = matrix.weight.detach().float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("weight", (matrix.weight.detach() / scale_O1).round().to(torch.int8))
        self.register_buffer("scale", scale_O1[:, 0].to(matrix.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


class Attention(nn.Module):
    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        self.heads, self.layer, self.qk_norm = spec.heads, layer, spec.qk_norm
        self.qkv = Linear(spec.width, 3 * spec.width)
        self.out = Linear(spec.width, spec.width)

    def forward(self, x_BTD: Tensor, cache: Cache | None, mask: Tensor | None, turns: Tensor | None) -> Tensor:
        batch, length, width = x_BTD.shape
        qk, v = self.qkv(x_BTD).contiguous().view(batch, length, 3, self.heads, -1).split([2, 1], 2)
        size = v.shape[-1]
        if self.qk_norm:
            qk = F.layer_norm(qk.float(), (size,))
        if turns is not None:
            qk = turn(qk, turns)
        q, k, v = (y.transpose(1, 2) for y in (*qk.unbind(2), v.squeeze(2)))
        scale = SHARPEST_LOGIT / size if self.qk_norm else size**-0.5
        y_BHTK = attention(q, k, v, mask, scale) if cache is None else cache.attend(self.layer, q.to(v.dtype), k.to(v.dtype), v, scale)
        return self.out(y_BHTK.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        self.attention = Attention(spec, layer)
        self.up = Linear(spec.width, 4 * spec.width)
        self.down = Linear(4 * spec.width, spec.width)

    def forward(self, x_BTD: Tensor, cache: Cache | None, mask: Tensor | None, turns: Tensor | None) -> Tensor:
        x_BTD = x_BTD + self.attention(F.layer_norm(x_BTD, x_BTD.shape[-1:]), cache, mask, turns)
        return x_BTD + self.down(relu(self.up(F.layer_norm(x_BTD, x_BTD.shape[-1:]))))


class Decoder(nn.Module):
    """Token ids (B, T) -> hidden states (B, T, D); :meth:`logits` maps those to the vocabulary or a slice of it.

    Attributes:
        recompute: whether blocks keep only their inputs for the backward pass and run again in it (activation checkpointing).
        compiled_decoding: whether cached decoding runs compiled, which pays on a GPU.
    """

    def __init__(self, spec: DecoderSpec, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.spec, self.vocabulary = spec, vocabulary
        self.tokens = nn.Embedding(vocabulary.size, spec.width)
        self.positions = nn.Embedding(spec.context, spec.width)
        self.places = nn.Embedding(1 + vocabulary.tokens_per_image, spec.width, padding_idx=0) if spec.image_positions else None
        self.previous = Linear(spec.width, spec.width) if spec.previous_token else None
        self.rotation = Rotation(spec.width // spec.heads, vocabulary.tokens_per_image, spec.context) if spec.rope else None
        self.blocks = nn.ModuleList(Block(spec, layer) for layer in range(spec.layers))
        self.recompute = False
        self.compiled_decoding = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal at three deviations; attention output and second feed-forward projection zero (paper, section 3.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = self.spec.position_std if module is self.positions else self.spec.init_std
                nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        if self.places is not None:
            nn.init.zeros_(self.places.weight[:1])
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.down.weight)

    @torch.no_grad()
    def start_from_codebook(self, entries_ED: Tensor, std: float) -> None:
        """Start the embeddings of image tokens as the image tokenizer's codebook vectors: whitened, turned into this width at random.

        Codes that look alike then start alike, on the way in and on the way out, and what is learned of one holds for the others.
        """
        centred = entries_ED - entries_ED.mean(0)
        left, _, _ = torch.linalg.svd(centred, full_matrices=False)
        rotation = nn.init.orthogonal_(torch.empty(left.shape[1], self.spec.width))
        vectors = left @ rotation
        start, stop = self.vocabulary.image_start, self.vocabulary.text_start
        self.tokens.weight[start:stop] = vectors * (std / vectors.std())

    def forward(
        self,
        tokens_BT: Tensor,
        places_BT: Tensor,
        cache: Cache | None = None,
        positions_BT: Tensor | None = None,
        mask: Tensor | None = None,
        previous_BT: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) after the last norm.

        Args:
            places_BT: place of each token in its image, from 1; 0 for what is no image token. For ``image_positions``, ``rope``.
            cache: what of the tokens before these attention reads; it also says which of them a token sees.
            positions_BT: positions of the tokens, by default counted from 0.
            mask: broadcastable to (B, 1, T, T), boolean, True where attention is allowed, or a bias; default causal. Without a cache.
            previous_BT: the token before each, by default as they stand in the rows; that at position 0 has none. Used with
                ``previous_token``.

        Raises:
            ValueError: if the sequence is longer than the context.
        """
        if tokens_BT.shape[1] > self.spec.context:
            raise ValueError(f"sequence of {tokens_BT.shape[1]} tokens is longer than the context of {self.spec.context}")
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.tokens(tokens_BT)
        if self.previous is not None:
            before_BTD = F.pad(x_BTD[:, :-1], (0, 0, 1, 0)) if previous_BT is None else self.tokens(previous_BT)
            x_BTD = x_BTD + self.previous(before_BTD * (positions_BT > 0).unsqueeze(-1))
        x_BTD = x_BTD + self.positions(positions_BT)
        if self.places is not None:
            x_BTD = x_BTD + self.places(places_BT)
        turns = None if self.rotation is None else self.rotation(places_BT, positions_BT)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, cache, mask, turns, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, cache, mask, turns)
        return F.layer_norm(x_BTD, x_BTD.shape[-1:])

    def quantize(self) -> None:
        """Hold the matrices of the blocks as 8-bit integers, a quarter of float32's memory; for inference only."""
        for block in self.blocks:
            for module in list(block.modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, Linear):
                        setattr(module, name, Int8Linear(child))

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits of the ids in ``[start, stop)``, (..., stop - start)."""
        return linear(hidden, self.tokens.weight[start:stop])

    def losses(
        self,
        tokens_BT: Tensor,
        weights_BT: Tensor,
        places_BT: Tensor,
        samples_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        z_loss: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Next-token losses of a batch: their weighted sum, differentiable, and each token's (B, T), nats, 0 where its weight is.

        Args:
            weights_BT: weight of each token as a target; the first of a row is none.
            samples_BT: number of the sample that each token belongs to, where several share a row; attention stays within a sample.
            positions_BT: of each token in its sample; needed with ``samples_BT``.
            z_loss: see :func:`~cm3leon.models.cross_entropy.chunked_cross_entropy`.
        """
        device = tokens_BT.device.type
        dtype = torch.get_autocast_dtype(device) if device != "cpu" and torch.is_autocast_enabled(device) else self.tokens.weight.dtype
        mask = None if samples_BT is None else block_causal(samples_BT, dtype)
        hidden_BTD = self(tokens_BT, places_BT, positions_BT=positions_BT, mask=mask)
        weights_BT = weights_BT.clone()
        weights_BT[:, 0] = 0
        targets_N = weights_BT.flatten().nonzero()[:, 0]
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, targets_N - 1)  # the token before each target; never of another row
        tokens_N, weights_N = tokens_BT.flatten()[targets_N], weights_BT.flatten()[targets_N]
        total, losses_N = chunked_cross_entropy(hidden_ND, self.tokens.weight, tokens_N, weights_N, z_loss)
        losses_BT = torch.zeros(weights_BT.shape, device=losses_N.device)
        losses_BT.view(-1)[targets_N] = losses_N
        return total, losses_BT

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def device(self) -> torch.device:
        return self.tokens.weight.device

    def save(self, directory: Path, tensors: dict[str, Tensor] | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``; ``tensors`` are the whole parameters where the model holds shards of them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {"decoder": asdict(self.spec), "vocabulary": asdict(self.vocabulary)}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in (tensors or self.state_dict()).items()}, directory / "model.safetensors")

    @classmethod
    def load(cls, directory: Path, device: str | torch.device = "cpu") -> Decoder:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if the directory holds no decoder.
        """
        directory = Path(directory)
        if not (directory / "model.safetensors").is_file():
            raise FileNotFoundError(f"{directory}: no decoder here; run the pipeline (make run) or: cm3leon pretrain")
        config = json.loads((directory / "config.json").read_text())
        model = cls(DecoderSpec(**current_names(config["decoder"], "pretrain.model")), Vocabulary(**config["vocabulary"]))
        model.load_state_dict(load_file(directory / "model.safetensors"))
        return model.to(device).eval()
