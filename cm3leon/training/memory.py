"""The memory that a decoder's training takes on each GPU, counted from the tensors that the trainer keeps.

That is FSDP2 as in ``training/distributed.py`` and the loss of ``models/cross_entropy.py``. Tests compare the counts with tensors on a CPU;
they have not been compared with a GPU's memory.

In comments, D is the width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from cm3leon.models.cross_entropy import CHUNK_ELEMENTS
from cm3leon.models.decoder import Decoder, DecoderSpec

if TYPE_CHECKING:
    from cm3leon.config.schema import TrainConfig

FP32, BF16 = 4, 2
"""Bytes."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        embeddings: of all that is outside the blocks: the embeddings, and the map of ``previous_token``.
        block: of one block.
        layers: number of blocks.
    """

    embeddings: int
    block: int
    layers: int

    @property
    def blocks(self) -> int:
        return self.layers * self.block

    @property
    def total(self) -> int:
        return self.embeddings + self.blocks


def count(model: Decoder) -> Parameters:
    """The parameters of a decoder."""
    block = sum(p.numel() for p in model.blocks[0].parameters())
    return Parameters(model.parameter_count - len(model.blocks) * block, block, len(model.blocks))


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    gathered: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_memory(model: Decoder, section: TrainConfig, gpus: int) -> Memory:
    """The memory of the busiest of ``gpus``, with rows of the context's length; under packing a micro-batch may have one row more.

    Parameters, gradients and optimizer states are float32, sharded among the GPUs. Two things are not counted: the savings of compilation,
    and the whole matrices that Muon gathers after the backward pass, when the activations have been freed.
    """
    parameters, spec = count(model), model.spec
    _, rows = rows_at_once(section, gpus)
    tokens = (rows + section.packing) * spec.context
    bf16, sharded = section.precision != "fp32", gpus > 1
    return Memory(
        parameters=FP32 * parameters.total / gpus,
        gradients=FP32 * parameters.total / gpus,
        optimizer=optimizer_bytes(parameters, section) / gpus,
        activations=activation_bytes(spec, section, tokens, sharded=sharded),
        loss=loss_bytes(model, tokens, bf16=bf16, sharded=sharded),
        gathered=gathered_bytes(parameters, bf16=bf16) if sharded else BF16 * parameters.blocks * bf16,
    )


def rows_at_once(section: TrainConfig, gpus: int) -> tuple[int, int]:
    """Rows of the batch that the busiest GPU has, and how many of them it computes at once (its micro-batch)."""
    share = -(-section.batch_size // gpus)
    return share, min(section.micro_batch_size or share, share)


def optimizer_bytes(parameters: Parameters, section: TrainConfig) -> int:
    """Optimizer states over all GPUs, float32: AdamW's two moments a parameter; Muon's one, for the parameters of the blocks."""
    moments = 2 if section.optimizer == "adamw" else 1
    return 2 * FP32 * parameters.embeddings + moments * FP32 * parameters.blocks


def block_bytes(spec: DecoderSpec, section: TrainConfig) -> int:
    """Activations that a block keeps of a token for its backward pass."""
    size = BF16 if section.precision != "fp32" else FP32
    # 1. The inputs of the two norms, D each; norms compute in float32 also under autocast.
    per_width = 2 * FP32
    # 2. In the run's precision: outputs of the norms 2 D; queries, keys and values 3 D; attention's output D; feed-forward 4 D.
    per_width += (2 + 3 + 1 + 4) * size
    # 3. With qk_norm or rope, queries and keys that are normalized or rotated, 2 D, beside those in the product of 3 D, which the values
    #    keep in memory; with qk_norm under autocast also the norm's float32 inputs, 2 D.
    if spec.qk_norm or spec.rope:
        per_width += 2 * size
    if spec.qk_norm and size == BF16:
        per_width += 2 * FP32
    # 4. Statistics: softmax's log-sum of each head; mean and deviation of the two norms, and of each head's query and key.
    statistics = FP32 * (spec.heads + 4 + (4 * spec.heads if spec.qk_norm else 0))
    return per_width * spec.width + statistics


def activation_bytes(spec: DecoderSpec, section: TrainConfig, tokens: int, *, sharded: bool) -> float:
    """Activations of all blocks at the peak of the backward pass, for ``tokens`` computed at once."""
    size = BF16 if section.precision != "fp32" else FP32
    block = block_bytes(spec, section)
    # 1. All blocks keep their activations; with activation checkpointing only their inputs, and one block has been computed again.
    #    Hidden states between blocks are float32, except where FSDP gathered the embeddings in bfloat16.
    hidden = (size if sharded else FP32) * spec.width
    kept = spec.layers * hidden + block if section.activation_checkpointing else spec.layers * block
    # 2. The block whose backward pass is running also holds the gradient of its feed-forward's hidden layer, 4 D.
    gradient = 4 * size * spec.width
    return tokens * (kept + gradient)


def loss_bytes(model: Decoder, tokens: int, *, bf16: bool, sharded: bool) -> float:
    """Final norm and chunked cross-entropy, for ``tokens`` computed at once."""
    matrix, vocabulary = model.tokens.weight.numel(), model.vocabulary.size
    # 1. Four float32 tensors of hidden states: input and output of the norm, the rows that have a target, and their gradient.
    hidden = 4 * FP32 * tokens * model.spec.width
    # 2. One chunk of logits and one of probabilities, float32, and under autocast the product in bfloat16.
    chunk = min(tokens, max(1, CHUNK_ELEMENTS["cuda"] // vocabulary)) * vocabulary
    logits = (2 * FP32 + BF16 * bf16) * chunk
    # 3. The gradient of the output matrix; under autocast a chunk's gradient in bfloat16 and, unless FSDP gathered it so, the matrix.
    copies = BF16 + (0 if sharded else BF16) if bf16 else 0
    return hidden + logits + (FP32 + copies) * matrix


def gathered_bytes(parameters: Parameters, *, bf16: bool) -> float:
    """Parameters and gradients that FSDP has gathered from all GPUs.

    The embeddings throughout; of the blocks the present one, the next one and the buffer that it is received in; and of one block the
    gradient and two float32 buffers for its reduction.
    """
    size = BF16 if bf16 else FP32
    return size * parameters.embeddings + (3 * size + size + 2 * FP32) * parameters.block
