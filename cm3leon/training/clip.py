"""Trains the small CLIP model: InfoNCE both ways over a batch, with hard negative captions.

Images of a batch are told apart mostly by their backgrounds and main colors; which object has which color, how many there are and what
is left of what decides only among near misses. So each caption also gets near misses of its own, made from the training captions alone:
one word is replaced by another that the captions use between the same two neighbors ("a _red_ circle" -> "a _blue_ circle"), or two
such slots of one caption exchange their words. They count as further negatives of their image (as in NegCLIP, Yuksekgonul et al. 2023).
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cm3leon.config.schema import EncoderConfig
from cm3leon.data.pixels import ImageSet
from cm3leon.models.clip import ClipTokenizer, Encoder, build_clip, embed_ids, embed_pixels, trained_settings
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.training.optimizer import learning_rate_at, set_learning_rate
from cm3leon.utils.errors import UserError

LARGEST_SCALE = math.log(100)  # of the logits, as CLIP


class NearMisses:
    """Captions that are one replacement, or one exchange, away from a given one."""

    def __init__(self, captions: Sequence[str], alternatives: int = 64) -> None:
        """Learn which words occur between which neighbors; slots with a single word, or more than ``alternatives``, offer nothing."""
        slots: dict[tuple[str, str], set[str]] = defaultdict(set)
        for caption in captions:
            words = ["", *caption.split(), ""]
            for before, word, after in zip(words, words[1:], words[2:], strict=False):
                slots[before, after].add(word)
        self._slots = {slot: sorted(words) for slot, words in slots.items() if 1 < len(words) <= alternatives}

    def __call__(self, caption: str, rng: random.Random) -> str | None:
        """A near miss of ``caption``, or None where it has no slot with an alternative."""
        words = caption.split()
        padded = ["", *words, ""]
        choices = [(i, self._slots[slot]) for i in range(len(words)) if (slot := (padded[i], padded[i + 2])) in self._slots]
        if not choices:
            return None
        exchanges = [
            (i, j)
            for i, options in choices
            for j, others in choices
            if i < j and words[i] != words[j] and words[j] in options and words[i] in others
        ]
        if exchanges and rng.random() < 0.3:
            i, j = rng.choice(exchanges)
            words[i], words[j] = words[j], words[i]
        else:
            i, options = rng.choice(choices)
            words[i] = rng.choice([word for word in options if word != words[i]])
        return " ".join(words)


def loss_of(
    image_vectors: torch.Tensor, text_vectors: torch.Tensor, hard_vectors: torch.Tensor, owners: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """InfoNCE both ways; ``hard_vectors[j]`` is one more wrong text, for image ``owners[j]`` alone.

    Args:
        image_vectors, text_vectors: ``(n, d)`` unit vectors, pairs by position.
        hard_vectors: ``(m, d)`` unit vectors, ``m`` may be 0.
        owners: ``(m,)`` positions in ``[0, n)``.
        scale: inverse temperature.
    """
    n = len(image_vectors)
    logits = scale * image_vectors @ text_vectors.T
    target = torch.arange(n, device=logits.device)
    by_text = cross_entropy(logits.T, target)
    if len(hard_vectors):
        hard = scale * image_vectors @ hard_vectors.T
        hard = hard.masked_fill(owners[None, :] != target[:, None], float("-inf"))
        logits = torch.cat([logits, hard], dim=1)
    return (cross_entropy(logits, target) + by_text) / 2


def _optimizer(model: nn.Module, config: EncoderConfig) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6)


class _Batches:
    """Endless shuffled batches of positions; an epoch's rest that fills no batch is dropped."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size, self.rng, self.order = count, min(size, count), np.random.default_rng(seed), np.zeros(0, dtype=np.int64)

    def next(self) -> np.ndarray:
        if len(self.order) < self.size:
            self.order = self.rng.permutation(self.count)
        batch, self.order = self.order[: self.size], self.order[self.size :]
        return batch


def train(
    config: EncoderConfig,
    images: ImageSet,
    captions: Sequence[Sequence[str]],
    seed: int,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Encoder:
    """Train an encoder on images and their captions (one at random each time). The same arguments give the same weights on one machine.

    Raises:
        UserError: if there are fewer than two images; ValueError: if an image has no caption.
    """
    if len(images) < 2 or len(images) != len(captions):
        found = f"{len(images)} images, {len(captions)} caption lists"
        raise UserError(f"contrastive training needs two or more images with captions, found {found}")
    if any(not texts for texts in captions):
        raise ValueError("every image needs a caption; drop images without one before training the encoder")
    every = [text for texts in captions for text in texts]
    near_misses = NearMisses(every)
    tokenizer = ClipTokenizer(TextTokenizer.train(every, config.vocabulary_size), config.context_length)
    settings = trained_settings(config, tokenizer.size)
    torch.manual_seed(seed)
    model = build_clip(settings["model"]).to(device).train()
    optimizer = _optimizer(model, config)
    batches, rng = _Batches(len(images), config.batch_size, seed), random.Random(seed)
    for step in range(config.steps):
        positions = batches.next()
        texts = [rng.choice(captions[i]) for i in positions]
        misses = [
            (owner, miss)
            for owner, i in enumerate(positions)
            for miss in _misses(near_misses, texts[owner], captions[i], config.hard_negatives, rng)
        ]
        pixels = torch.from_numpy(images[positions]).permute(0, 3, 1, 2).to(device)
        vectors = embed_ids(model, tokenizer(texts + [miss for _, miss in misses]).to(device))
        owners = torch.tensor([owner for owner, _ in misses], dtype=torch.long, device=device)
        scale = model.logit_scale.clamp(max=LARGEST_SCALE).exp()  # type: ignore[operator, union-attr]
        loss = loss_of(embed_pixels(model, pixels), vectors[: len(texts)], vectors[len(texts) :], owners, scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = learning_rate_at(step, peak=config.learning_rate, steps=config.steps, warmup_steps=config.warmup_steps)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        on_step(step, float(loss.detach()))
    return Encoder(model, settings, tokenizer)


def _misses(near_misses: NearMisses, text: str, own: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Up to ``count`` near misses that are not captions of the same image."""
    found = (near_misses(text, rng) for _ in range(count))
    return [miss for miss in found if miss is not None and miss not in own]
