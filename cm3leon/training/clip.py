"""Training of the small CLIP model: InfoNCE in both directions over a batch, with hard negative captions.

The images of a batch differ in their backgrounds and main colors, which suffices to tell them apart. Which object has which color, how
many there are and what is left of what only matters between captions that are nearly the same. So each caption gets hard negatives of its
own (as in NegCLIP, Yuksekgonul et al. 2023, arXiv 2210.01936), made from the training captions alone: one word is replaced by another that
the captions use between the same two words ("a _red_ circle" -> "a _blue_ circle"), or two words are swapped that the captions use in each
other's position.

Shapes: n images of a batch, m hard negatives, d dimensions.
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
from cm3leon.data.manifest import ImageStore
from cm3leon.data.pixels import ImageSet
from cm3leon.models.clip import ClipTokenizer, Encoder, build_clip, embed_ids, embed_pixels, trained_settings
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.training.optimizer import learning_rate_at, set_learning_rate
from cm3leon.utils.errors import UserError

MAX_LOGIT_SCALE = math.log(100)
"""Upper bound of the learned log inverse temperature (CLIP, arXiv 2103.00020, section 2.5)."""

SWAP_SHARE = 0.3
"""Share of the hard negatives that swap two words, where a caption has words to swap."""


class HardNegatives:
    """Captions that differ from a given one by one replaced word, or by two swapped words."""

    def __init__(self, captions: Sequence[str], alternatives: int = 64) -> None:
        """Learn which words occur in which slot, a slot being the words before and after.

        Slots with one word have no alternative; slots with more than ``alternatives`` say nothing about the word and are not used.
        """
        slots: dict[tuple[str, str], set[str]] = defaultdict(set)
        for caption in captions:
            words = ["", *caption.split(), ""]
            for before, word, after in zip(words, words[1:], words[2:], strict=False):
                slots[before, after].add(word)
        self._slots = {slot: sorted(words) for slot, words in slots.items() if 1 < len(words) <= alternatives}

    def __call__(self, caption: str, rng: random.Random) -> str | None:
        """A hard negative of ``caption``; None if none of its words has an alternative."""
        # 1. The words that can be replaced: position -> words seen in that slot.
        words = caption.split()
        padded = ["", *words, ""]
        slots = [(position, (padded[position], padded[position + 2])) for position in range(len(words))]
        options = {position: self._slots[slot] for position, slot in slots if slot in self._slots}
        if not options:
            return None
        # 2. Pairs of different words that have each been seen in the other's slot.
        pairs = [(i, j) for i in options for j in options if i < j and words[i] != words[j]]
        swaps = [(i, j) for i, j in pairs if words[j] in options[i] and words[i] in options[j]]
        # 3. Swap or replace.
        if swaps and rng.random() < SWAP_SHARE:
            i, j = rng.choice(swaps)
            words[i], words[j] = words[j], words[i]
        else:
            i = rng.choice(list(options))
            words[i] = rng.choice([word for word in options[i] if word != words[i]])
        return " ".join(words)


def contrastive_loss(
    images_nd: torch.Tensor, texts_nd: torch.Tensor, negatives_md: torch.Tensor, owners_m: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """InfoNCE in both directions, with hard negatives for the images.

    With unit vectors v_i of images, t_i of texts, and h_j of the hard negatives, inverse temperature s:

        image -> text:  -log exp(s v_i t_i) / (sum_k exp(s v_i t_k) + sum_{j of i} exp(s v_i h_j))
        text -> image:  -log exp(s v_i t_i) / sum_k exp(s v_k t_i)

    The loss is the mean over i of both, halved (CLIP, arXiv 2103.00020, section 2.3; NegCLIP, arXiv 2210.01936, section 4).

    Args:
        images_nd, texts_nd: pairs by position.
        negatives_md: m may be 0.
        owners_m: the image that each hard negative belongs to, in ``[0, n)``; it is no negative of other images.
        scale: inverse temperature.
    """
    logits_nn = scale * images_nd @ texts_nd.T
    target_n = torch.arange(len(images_nd), device=logits_nn.device)
    text_to_image = cross_entropy(logits_nn.T, target_n)
    logits = logits_nn
    if len(negatives_md):
        hard_nm = scale * images_nd @ negatives_md.T
        hard_nm = hard_nm.masked_fill(owners_m[None, :] != target_n[:, None], float("-inf"))
        logits = torch.cat([logits_nn, hard_nm], dim=1)
    image_to_text = cross_entropy(logits, target_n)
    return (image_to_text + text_to_image) / 2


def _optimizer(model: nn.Module, config: EncoderConfig) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6)


class _Batches:
    """Endless shuffled batches of positions; the end of an epoch that does not fill a batch is dropped."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size = count, min(size, count)
        self.rng = np.random.default_rng(seed)
        self.order = np.zeros(0, dtype=np.int64)

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
    """Train an encoder on images and their captions, one of each image's at random in every batch.

    The same arguments give the same weights on one machine.

    Raises:
        UserError: if there are fewer than two images, or another number of caption lists.
        ValueError: if an image has no caption.
    """
    if len(images) < 2 or len(images) != len(captions):
        counts = f"{len(images)} images, {len(captions)} caption lists"
        raise UserError(f"contrastive training needs two or more images with captions, found {counts}")
    if not all(captions):
        raise ValueError("every image needs a caption; drop images without one before training the encoder")
    every_caption = [caption for own in captions for caption in own]
    hard_negatives = HardNegatives(every_caption)
    tokenizer = ClipTokenizer(TextTokenizer.train(every_caption, config.vocabulary_size), config.context_length)
    settings = trained_settings(config, tokenizer.size)
    torch.manual_seed(seed)
    model = build_clip(settings["model"]).to(device).train()
    optimizer = _optimizer(model, config)
    batches, rng = _Batches(len(images), config.batch_size, seed), random.Random(seed)
    for step in range(config.steps):
        # 1. A batch of images with one caption each, and hard negatives of these captions.
        positions = batches.next()
        texts = [rng.choice(captions[position]) for position in positions]
        negatives: list[str] = []
        owners: list[int] = []
        for owner, position in enumerate(positions):
            found = _negatives(hard_negatives, texts[owner], captions[position], config.hard_negatives, rng)
            negatives += found
            owners += [owner] * len(found)
        # 2. Embed. Captions and hard negatives go through the text tower together.
        pixels = torch.from_numpy(images[positions]).permute(0, 3, 1, 2).to(device)
        vectors = embed_ids(model, tokenizer(texts + negatives).to(device))
        texts_nd, negatives_md = vectors[: len(texts)], vectors[len(texts) :]
        owners_m = torch.tensor(owners, dtype=torch.long, device=device)
        # 3. Loss and update.
        scale = model.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()  # type: ignore[operator]
        loss = contrastive_loss(embed_pixels(model, pixels), texts_nd, negatives_md, owners_m, scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = learning_rate_at(step, peak=config.learning_rate, steps=config.steps, warmup_steps=config.warmup_steps)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        on_step(step, float(loss.detach()))
    return Encoder(model, settings, tokenizer)


def _negatives(hard_negatives: HardNegatives, text: str, own: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Up to ``count`` hard negatives of ``text``; those that are captions of the same image, ``own``, are left out."""
    found = (hard_negatives(text, rng) for _ in range(count))
    return [negative for negative in found if negative is not None and negative not in own]


def validate(encoder: Encoder, store: ImageStore, refs: Sequence[str], captions: Sequence[str]) -> dict[str, float]:
    """Recall at 1 of retrieval among pairs of images and captions, in both directions, and the mean CLIP score of the pairs."""
    texts_nd = encoder.encode_texts(captions)
    images_nd = encoder.encode_refs(store, refs)
    return {
        "recall_text_to_image": recall_at_1(texts_nd, images_nd),
        "recall_image_to_text": recall_at_1(images_nd, texts_nd),
        "clip_score": float((texts_nd * images_nd).sum(axis=1).mean()) if len(refs) else 0.0,
    }


def recall_at_1(queries_nd: np.ndarray, targets_nd: np.ndarray) -> float:
    """Share of queries whose most similar target is the one at the same position."""
    if not len(queries_nd):
        return 0.0
    nearest_n = np.argmax(queries_nd @ targets_nd.T, axis=1)
    return float((nearest_n == np.arange(len(queries_nd))).mean())
