"""How many sequences are generated together: as many as free memory has room for, and at most ``engine.MAX_ROWS``.

What counts are the keys and values of the caches (``cache.py``): two vectors of the model's width for each layer and token. A prompt's are
held once for all its candidates, or copied where it is short. What is generated does not depend on the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from cm3leon.generation.cache import MIN_UNCOPIED_PROMPT
from cm3leon.generation.engine import MAX_ROWS
from cm3leon.models.decoder import Decoder

USABLE = 0.7
"""Share of the free memory for keys and values. The rest is for the activations of reading prompts, for logits and for pixels."""
FLOAT32 = 4
"""Bytes."""


@dataclass(frozen=True)
class SequenceBytes:
    """Bytes of keys and values: of a prompt, and of each of its continuations."""

    prompt: int
    continuation: int


def sequence_bytes(model: Decoder, prompt_tokens: int, new_tokens: int) -> SequenceBytes:
    """The keys and values of a prompt and of continuations by ``new_tokens``."""
    size = (model.compute_dtype or model.tokens.weight.dtype).itemsize
    numbers = 2 * model.spec.layers * model.spec.width
    if prompt_tokens < MIN_UNCOPIED_PROMPT:
        return SequenceBytes(numbers * prompt_tokens * size, numbers * (prompt_tokens + new_tokens) * size)
    # Beside a prompt that is held once, a continuation has one entry for it, and is float32.
    return SequenceBytes(numbers * prompt_tokens * size, numbers * (1 + new_tokens) * FLOAT32)


def batch_shape(of: SequenceBytes, streams: int, candidates: int, free: int) -> tuple[int, int]:
    """How many prompts are generated from together, and how many candidates of each.

    All candidates of as many prompts as fit; where those of a single prompt do not fit, as many of its candidates as do; at least one.

    Args:
        streams: of guidance, each of which reads every prompt and every candidate.
        candidates: wanted of each prompt.
        free: free memory, bytes.
    """
    room, most = int(free * USABLE) // streams, max(1, MAX_ROWS // streams)
    prompts = min(most // candidates, room // (of.prompt + candidates * of.continuation))
    if prompts:
        return prompts, candidates
    return 1, max(1, min(most, candidates, (room - of.prompt) // of.continuation))
