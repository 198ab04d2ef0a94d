"""CM3leon (arXiv 2309.02591) for ``transformers``: one causal decoder over text and image tokens, and its image tokenizer.

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    prompt = tokenizer("<eos>a red circle<break>", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=model.config.tokens_per_image)
    pixels = model.decode_images(tokens[:, prompt.input_ids.shape[1] :])  # uint8 (1, H, W, 3)

A sequence is ``<eos> text <break> image <eos>``, or several such documents with ``<break>`` between them. An answer about an image is a
masked span that follows the image: ``<eos> text <mask:0> text <break> image <mask:0> answer <eoss>``. ``generate`` keeps to this grammar.

Shapes: B batch, T tokens, S tokens with the cached ones, D width, H heads, K head dim, E tokens of an image, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_cm3leon import BREAK, EOS, EOSS, FIRST_MASK, Cm3leonConfig
from .image_tokenizer_cm3leon import ImageTokenizer

MAX_ROPE_FREQUENCY = 1.5
"""Angle per position, row or column of a head's fastest rotating pair, radians."""

MAX_ATTENTION_LOGIT = 11.0
"""Attention logit of parallel queries and keys under ``qk_norm``."""


def is_image(tokens: Tensor, config: Cm3leonConfig) -> Tensor:
    """Which token ids (...) are image codes."""
    return (tokens >= config.image_start) & (tokens < config.text_start)


def raster_positions(tokens_BT: Tensor, config: Cm3leonConfig) -> Tensor:
    """Raster index of each token in its image (B, T), from 1; 0 for tokens of no image. Images before the last token are whole."""
    image_BT = is_image(tokens_BT, config)
    return ((image_BT.cumsum(1) - 1) % config.tokens_per_image + 1) * image_BT


def rotary_angles(image_positions_BT: Tensor, positions_BT: Tensor, config: Cm3leonConfig) -> Tensor:
    """Angles (B, T, 2, 1, K / 2) by which the pairs of queries and keys are rotated.

    A head's pairs are in four groups, rotated by row, by column, by sequence position, and not at all. A key is rotated by the row and
    column of its own token, a query by those of the next one, which it predicts. Tokens of no image have those of the first image token.
    """
    side, pairs = config.image_side, config.hidden_size // config.num_attention_heads // 8
    raster_BT2 = torch.stack([image_positions_BT % config.tokens_per_image, (image_positions_BT - 1).clamp(min=0)], -1)
    steps = (
        (raster_BT2 // side, side),
        (raster_BT2 % side, side),
        (positions_BT[..., None].expand_as(raster_BT2), config.max_position_embeddings),
    )
    exponents = torch.linspace(0, 1, pairs, device=raster_BT2.device)
    rotated = [found[..., None] * (MAX_ROPE_FREQUENCY * float(longest) ** -exponents) for found, longest in steps]
    return torch.cat([*rotated, torch.zeros_like(rotated[0])], -1).unsqueeze(3)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate each pair of adjacent elements of ``x`` (..., K) by an angle (..., K / 2), in float32."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: Cm3leonConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.layer, self.qk_norm = config.num_attention_heads, layer, config.qk_norm
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, visible_B1TS: Tensor, angles: Tensor | None, cache: Cache | None) -> Tensor:
        qk, v = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).split([2, 1], 2)
        size = v.shape[-1]
        if self.qk_norm:
            qk = F.layer_norm(qk.float(), (size,))
        if angles is not None:
            qk = rotate(qk, angles)
        q, k, v = (y.transpose(1, 2).to(v.dtype) for y in (*qk.unbind(2), v.squeeze(2)))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        scale = MAX_ATTENTION_LOGIT / size if self.qk_norm else size**-0.5
        y_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_B1TS, scale=scale)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, both residual; norms have no parameters."""

    def __init__(self, config: Cm3leonConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.up = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.down = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, visible_B1TS: Tensor, angles: Tensor | None, cache: Cache | None) -> Tensor:
        x_BTD = x_BTD + self.attention(F.layer_norm(x_BTD, x_BTD.shape[-1:]), visible_B1TS, angles, cache)
        return x_BTD + self.down(F.relu(self.up(F.layer_norm(x_BTD, x_BTD.shape[-1:]))))


class Cm3leonForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with its image tokenizer."""

    config_class = Cm3leonConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"lm_head.weight": "tokens.weight"}
    _keep_in_fp32_modules_strict = ["image_tokenizer"]  # in half precision many entries of the codebook are equally near

    def __init__(self, config: Cm3leonConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        self.image_positions = nn.Embedding(1 + config.tokens_per_image, width, padding_idx=0) if config.image_positions else None
        self.previous = nn.Linear(width, width, bias=False) if config.previous_token else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.image_tokenizer = ImageTokenizer(config).requires_grad_(False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        previous_ids: Tensor | None = None,
        image_positions: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) of the token after each one.

        Args:
            input_ids: (B, T), without the tokens that the cache holds.
            attention_mask: (B, S), 0 for padding; by default there is none. Positions count from each row's first token.
            previous_ids: (B, T), the token before each one, by default its left neighbor.
            image_positions: (B, T), raster index of each token in its image, from 1, 0 for tokens of no image; by default counted from
                ``input_ids``, in which images are whole.
            labels: (B, T), token ids to predict, -100 for none; shifted here.
            logits_to_keep: logits of the last so many tokens only; 0: of all.

        Raises:
            ValueError: if the sequence is longer than ``max_position_embeddings``, the mask is not (B, S), or tokens follow cached ones
                without ``previous_ids`` and ``image_positions``, which cannot be known from ``input_ids`` then.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if past and (previous_ids is None or image_positions is None):
            raise ValueError(
                "tokens after cached ones need previous_ids and image_positions, which prepare_inputs_for_generation makes of the whole "
                "sequence; for guidance pass guidance_scale to generate, not in a generation config"
            )
        if past_key_values is not None and past_key_values.is_compileable:
            raise ValueError("static caches are not supported; leave cache_implementation out")
        positions_BT, visible_B1TS = self._positions_and_mask(input_ids, attention_mask, past)
        if image_positions is None:
            image_positions = raster_positions(input_ids, self.config)
        x_BTD = self.tokens(input_ids)
        if self.previous is not None:
            previous_ids = F.pad(input_ids[:, :-1], (1, 0)) if previous_ids is None else previous_ids
            x_BTD = x_BTD + self.previous(self.tokens(previous_ids) * (positions_BT > 0).unsqueeze(-1))
        x_BTD = x_BTD + self.positions(positions_BT)
        if self.image_positions is not None:
            x_BTD = x_BTD + self.image_positions(image_positions)
        angles = rotary_angles(image_positions, positions_BT, self.config) if self.config.rope else None
        for block in self.blocks:
            x_BTD = block(x_BTD, visible_B1TS, angles, past_key_values)
        x_BTD = F.layer_norm(x_BTD, x_BTD.shape[-1:])
        logits_BTV = self.lm_head(x_BTD[:, -logits_to_keep:])
        loss = None if labels is None else self.loss_function(logits_BTV, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=past_key_values)

    def _positions_and_mask(self, tokens_BT: Tensor, mask_BS: Tensor | None, past: int) -> tuple[Tensor, Tensor]:
        """Sequence positions (B, T), and which tokens each one sees (B, 1, T, S): itself and those before it, without padding."""
        batch, length = tokens_BT.shape
        total = past + length
        if mask_BS is None:
            mask_BS = torch.ones(batch, total, dtype=torch.int64, device=tokens_BT.device)
        if mask_BS.shape != (batch, total):
            raise ValueError(f"the attention mask must be {(batch, total)}, cached tokens included, found {tuple(mask_BS.shape)}")
        positions_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
        context = self.config.max_position_embeddings
        if total > context and (longest := int(positions_BS.max()) + 1) > context:
            raise ValueError(f"a sequence of {longest} tokens is longer than the context of {context}")
        columns_S = torch.arange(total, device=tokens_BT.device)
        own_T1 = columns_S[past:, None]
        # Padding sees itself: the softmax of a row of -inf is not a number.
        visible_BTS = (columns_S <= own_T1) & mask_BS[:, None].bool() | (columns_S == own_T1)
        return positions_BS[:, past:], visible_BTS[:, None]

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Cache | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Arguments of :meth:`forward` for the tokens of whole sequences (B, S) that the cache does not hold."""
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        return {
            "input_ids": input_ids[:, past:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "previous_ids": F.pad(input_ids[:, :-1], (1, 0))[:, past:],
            "image_positions": raster_positions(input_ids, self.config)[:, past:],
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: LogitsProcessorList | None = None,
        guidance_scale: float = 1.0,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """``transformers``' own ``generate``, confined to the :class:`Grammar`.

        Args:
            guidance_scale: of :class:`Guidance`; 1: none.
            negative_prompt_ids: the prompt of guidance's other stream, one row or as many as the prompt has; by default
                ``<eos> <mask:0> <break>``, as in training.
            negative_prompt_attention_mask: its padding, on the left.
        """
        processors = LogitsProcessorList([Grammar(self.config), *(logits_processor or [])])
        if guidance_scale != 1:
            if negative_prompt_ids is None:
                negative_prompt_ids = torch.tensor([[EOS, FIRST_MASK, BREAK]], device=self.device)
            processors.insert(0, Guidance(self, guidance_scale, negative_prompt_ids, negative_prompt_attention_mask))
        return super().generate(inputs, generation_config, logits_processor=processors, **kwargs)

    def encode_images(self, images_BHW3: Tensor) -> Tensor:
        """Image tokens (B, E) of uint8 images (B, image_size, image_size, 3).

        Raises:
            ValueError: for images of another shape or type.
        """
        return self.image_tokenizer.encode(images_BHW3) + self.config.image_start

    def decode_images(self, tokens_BE: Tensor) -> Tensor:
        """uint8 images (B, image_size, image_size, 3) of image tokens (B, E), on the CPU.

        Raises:
            ValueError: if these are not whole images.
        """
        count = self.config.tokens_per_image
        if tokens_BE.ndim != 2 or tokens_BE.shape[1] != count or not bool(is_image(tokens_BE, self.config).all()):
            raise ValueError(f"expected whole images, (B, {count}) image tokens, found {tuple(tokens_BE.shape)}; leave the prompt out")
        return self.image_tokenizer.decode(tokens_BE - self.config.image_start)


class Grammar(LogitsProcessor):
    """Only tokens that may follow: images are whole, one follows a text's ``<break>``, and answers after ``<mask:0>`` are text."""

    def __init__(self, config: Cm3leonConfig) -> None:
        self.config = config

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with -inf for tokens that may not follow the sequences (B, S)."""
        ids_V = torch.arange(scores.shape[-1], device=scores.device)
        text_V, end_V = ids_V >= self.config.text_start, (ids_V == BREAK) | (ids_V == EOS)
        # 1. Where each sequence stands. The masks of a body come again in its tail, before what they stand for.
        index_B1 = raster_positions(input_ids, self.config)[:, -1:]
        whole_B1 = index_B1 == self.config.tokens_per_image
        before_B1 = F.pad(input_ids, (1, 0))[:, -2:-1]
        after_text_B1 = (input_ids[:, -1:] == BREAK) & ~is_image(before_B1, self.config)
        in_image_B1 = (index_B1 > 0) & ~whole_B1 | after_text_B1
        in_tail_B1 = (input_ids == FIRST_MASK).sum(1, keepdim=True) > 1
        # 2. What may follow.
        text_BV = text_V | torch.where(in_tail_B1, ids_V == EOSS, end_V)
        allowed_BV = torch.where(in_image_B1, is_image(ids_V, self.config), torch.where(whole_B1, end_V, text_BV))
        return scores.masked_fill(~allowed_BV, -torch.inf)


class Guidance(LogitsProcessor):
    """Classifier-free guidance, ``l = l_u + scale * (l_c - l_u)`` (arXiv 2309.02591, section 3.1).

    The unconditional stream reads its own prompt and then what is generated, with a cache of its own. For greedy search and sampling.
    """

    def __init__(self, model: Cm3leonForCausalLM, scale: float, prompt_BS: Tensor, mask_BS: Tensor | None) -> None:
        self.model, self.scale = model, scale
        self.prompt_BS, self.mask_BS = prompt_BS, torch.ones_like(prompt_BS) if mask_BS is None else mask_BS
        self.cache = DynamicCache(config=model.config)
        self.read: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guided scores (B, V).

        Raises:
            ValueError: if the sequences are not those before and one token more, as in beam search.
        """
        if self.read is None:
            self.start = input_ids.shape[1]
        elif not torch.equal(self.read, input_ids[:, :-1]):
            raise ValueError("guidance_scale works with greedy search and sampling only; leave num_beams out")
        self.read = input_ids
        generated = input_ids[:, self.start :]
        prompt, mask = (x.repeat_interleave(len(input_ids) // len(x), 0).to(input_ids.device) for x in (self.prompt_BS, self.mask_BS))
        tokens, mask = torch.cat([prompt, generated], 1), torch.cat([mask, torch.ones_like(generated)], 1)
        inputs = self.model.prepare_inputs_for_generation(tokens, self.cache, mask, logits_to_keep=1)
        with torch.no_grad():
            unconditional = self.model(**inputs).logits[:, -1].float()
        return unconditional.lerp(scores, self.scale)
