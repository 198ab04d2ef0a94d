"""Made-up tokenized documents and small decoders for tests."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cm3leon.config.schema import DecodingConfig, ObjectiveConfig
from cm3leon.data.tokens import Document
from cm3leon.models.decoder import DecoderSpec

OBJECTIVE = ObjectiveConfig(mean_masks=1.0, segment_rate=0.15, caption_share=0.67, text_weight=1.0)
"""Masks as often as in CM3, so that few samples have all kinds."""


def make_documents(count: int, seed: int = 0, text_size: int = 100) -> Iterator[Document]:
    """``count`` documents of 16 codes below 50 and one or two texts; ids are 1, 2, ... in hex."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        texts = [rng.integers(text_size, size=int(rng.integers(3, 12))) for _ in range(int(rng.integers(1, 3)))]
        yield Document(f"{number + 1:016x}", rng.integers(50, size=16).astype(np.uint16), texts)


def decoder_spec(layers: int, width: int, heads: int, context: int, **options: Any) -> DecoderSpec:
    """The paper's decoder of any size, without the options that it has not."""
    plain = {"init_std": 0.006, "position_std": 0.0002, "qk_norm": False, "image_positions": False, "rope": False, "previous_token": False}
    return DecoderSpec(layers, width, heads, context, **{**plain, **options})


def decoding(**changes: Any) -> DecodingConfig:
    """Decoding with guidance and a nucleus, ranked by the CLIP score alone, the same for every task."""
    plain = {"temperature": 0.8, "top_p": 0.9, "guidance": 2.0, "candidates": 4, "likelihood": 0.0, "tasks": {}}
    return DecodingConfig(**{**plain, **changes})


class TensorSizes(TorchDispatchMode):
    """Elements of every tensor that operations return while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.sizes.extend(tensor.numel() for tensor in tree_leaves(found) if isinstance(tensor, torch.Tensor))
        return found
