"""Configuration of a CM3leon: the decoder's shape and options, the layout of its token ids, and the image tokenizer's architecture."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

PAD, EOS, BREAK, EOSS, FIRST_MASK = range(5)
"""``<pad>``, ``<eos>`` (which also opens a sequence), ``<break>`` between segments, ``<eoss>`` after a span, and ``<mask:0>``."""

IMAGE_TOKENIZER = {
    "image_size": 64,
    "patch": 4,
    "channels": 32,
    "multipliers": (1, 2),
    "blocks": 1,
    "decoder_blocks": 1,
    "encoder_kernel": 3,
    "embedding_dim": 16,
    "codebook_size": 512,
}


class Cm3leonConfig(PreTrainedConfig):
    """Configuration of a ``Cm3leonForCausalLM``.

    Token ids are ordered ``<pad> <eos> <break> <eoss> | masks | reserved | image codes | text``.

    Args:
        vocab_size: all token ids.
        hidden_size: width of the residual stream; the feed-forward is four times as wide.
        max_position_embeddings: longest sequence, tokens.
        qk_norm: queries and keys are normalized.
        image_positions: an embedding of its raster index is added to each image token.
        rope: rotary embedding of positions, and of rows and columns in images.
        previous_token: a projection of the previous token's embedding is added to each token.
        sentinels: number of mask tokens, ``<mask:0>`` first.
        reserved: unused ids.
        image_tokenizer: architecture of the VQ-GAN: ``image_size`` and ``patch`` in pixels, ``channels`` and each level's ``multipliers``
            of them, residual ``blocks`` and ``decoder_blocks`` a level, ``encoder_kernel``, ``embedding_dim``, ``codebook_size``.
    """

    model_type = "cm3leon"

    def __init__(
        self,
        vocab_size: int = 1024,
        hidden_size: int = 96,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 3,
        max_position_embeddings: int = 256,
        qk_norm: bool = False,
        image_positions: bool = False,
        rope: bool = False,
        previous_token: bool = False,
        sentinels: int = 16,
        reserved: int = 0,
        image_tokenizer: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.qk_norm = qk_norm
        self.image_positions = image_positions
        self.rope = rope
        self.previous_token = previous_token
        self.sentinels = sentinels
        self.reserved = reserved
        self.image_tokenizer = {**IMAGE_TOKENIZER, **(image_tokenizer or {})}
        super().__init__(
            **{"pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": [EOS, EOSS], "tie_word_embeddings": True, **kwargs},
        )

    @property
    def image_side(self) -> int:
        """Tokens along one side of an image."""
        spec = self.image_tokenizer
        return int(spec["image_size"] // (spec["patch"] * 2 ** (len(spec["multipliers"]) - 1)))

    @property
    def tokens_per_image(self) -> int:
        """Tokens of an image."""
        return self.image_side**2

    @property
    def image_start(self) -> int:
        """Id of the first image code."""
        return FIRST_MASK + self.sentinels + self.reserved

    @property
    def text_start(self) -> int:
        """Id of the first text token; all from here on are text."""
        return self.image_start + int(self.image_tokenizer["codebook_size"])
