"""Training of the small CLIP model: InfoNCE in both directions over a batch, with hard negative captions.

The images of a batch differ in their backgrounds and main colors, which suffices to tell them apart. Which object has which color, how
many there are and what is left of what only matters between captions that are nearly the same. So each caption gets hard negatives of its
own (as in NegCLIP, Yuksekgonul et al. 2023, arXiv 2210.01936), made from the training captions alone: one word is replaced by another that
the captions use between the same two words ("a _red_ circle" -> "a _blue_ circle"), or two words are swapped that the captions use in each
other's position.

Shapes: n images of a batch, m hard negatives, d dimensions.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cm3leon.config.schema import EncoderConfig
from cm3leon.data.manifest import ImageStore
from cm3leon.data.pixels import Images, batches_of
from cm3leon.models.clip import ClipTokenizer, Encoder, build_clip, embed_ids, embed_pixels, trained_settings, without_padding
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.training import loop
from cm3leon.training.checkpoint import Checkpoints
from cm3leon.training.distributed import sum_gradients
from cm3leon.training.dry_run import DryWorld, StepMemory, measure, micro_batch, on_a_gpu
from cm3leon.training.loop import Log, Metrics
from cm3leon.training.optimizer import allocate_states, learning_rate_at, set_learning_rate, state_tensors
from cm3leon.training.precision import autocast
from cm3leon.training.shuffling import shuffled_batches
from cm3leon.utils.device import copied_to
from cm3leon.utils.errors import UserError
from cm3leon.utils.world import ALONE, World

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


def contrastive_loss(images_nd: Tensor, texts_nd: Tensor, negatives_md: Tensor, owners_m: Tensor, scale: Tensor) -> Tensor:
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


@dataclass(frozen=True)
class Pairs:
    """A batch: this process's images, and the captions of all images with their hard negatives.

    Attributes:
        pixels: uint8 (n, H, W, 3), those of ``rows``.
        negatives: of each caption.
    """

    pixels: np.ndarray
    rows: slice
    captions: list[str]
    negatives: list[list[str]]


@dataclass(frozen=True)
class Part:
    """A micro-batch on the device: pixels, uint8 (n, 3, size, size), and token ids (n + m, L) of captions and hard negatives."""

    pixels: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Vectors:
    """Unit vectors of images (n, d), and of their captions and these captions' hard negatives together (n + m, d)."""

    images_nd: Tensor
    words_md: Tensor

    def parts(self) -> list[Tensor]:
        """Images, captions, hard negatives."""
        n = len(self.images_nd)
        return [self.images_nd, self.words_md[:n], self.words_md[n:]]


class EncoderTrainer:
    """One training run: network, optimizer, and the choice of captions.

    Each image is compared with all captions of the batch, so the loss needs the vectors of the whole batch. That takes the memory of a
    micro-batch only: vectors are computed without a graph, the loss and its gradient at the vectors follow from all of them, and each
    micro-batch is embedded again to carry that gradient on to the parameters (gradient caching: Gao et al. 2021, arXiv 2101.06983).
    Processes exchange their vectors in the same way. A batch that is one micro-batch is embedded once.
    """

    def __init__(
        self,
        config: EncoderConfig,
        images: Images,
        captions: Sequence[Sequence[str]],
        tokenizer: ClipTokenizer,
        seed: int,
        world: World = ALONE,
    ) -> None:
        self.config, self.images, self.captions, self.tokenizer, self.seed, self.world = config, images, captions, tokenizer, seed, world
        self.batch_size = min(config.batch_size, len(images))
        self.hard_negatives = HardNegatives(_together(captions))
        self.settings = trained_settings(config, tokenizer.size)
        torch.manual_seed(seed)
        self.model: Any = build_clip(self.settings["model"]).to(world.device).train()
        self.optimizer = _optimizer(self.model, config)
        allocate_states([self.optimizer])

    def batches(self, first: int) -> Generator[Pairs, None, None]:
        """The pairs of each step; see :class:`~cm3leon.training.loop.Trainer`."""
        rows = self.world.share(self.batch_size)
        drawn, again = itertools.tee(shuffled_batches(len(self.images), self.batch_size, self.seed, first))
        read = batches_of(self.images, (positions[rows] for positions in again))
        for step, positions, pixels in zip(itertools.count(first), drawn, read, strict=False):
            yield Pairs(pixels, rows, *self.draw(step, positions))

    def step(self, number: int, batch: Pairs) -> Metrics:
        """One optimization step; see :class:`~cm3leon.training.loop.Trainer`."""
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.backward(self.parts(batch), [len(found) for found in batch.negatives])
        sum_gradients(self.model.parameters(), self.world)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = learning_rate_at(number, peak=config.learning_rate, steps=config.steps, warmup_steps=config.warmup_steps)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return {"loss": loss, "gradient_norm": norm}

    def draw(self, step: int, positions: np.ndarray) -> tuple[list[str], list[list[str]]]:
        """One caption of each image, and their hard negatives; the same in every process."""
        rng = random.Random(f"{self.seed} {step}")
        texts = [rng.choice(self.captions[position]) for position in positions]
        return texts, [self.negatives(text, self.captions[position], rng) for text, position in zip(texts, positions, strict=True)]

    def negatives(self, text: str, own: Sequence[str], rng: random.Random) -> list[str]:
        """Up to ``hard_negatives`` of ``text``; those that are captions of the same image, ``own``, are left out."""
        found = (self.hard_negatives(text, rng) for _ in range(self.config.hard_negatives))
        return [negative for negative in found if negative is not None and negative not in own]

    def parts(self, batch: Pairs) -> list[Part]:
        """The micro-batches of this process's pairs."""
        captions, negatives = batch.captions[batch.rows], batch.negatives[batch.rows]
        size = self.config.micro_batch_size or len(captions)
        chosen = [slice(start, start + size) for start in range(0, len(captions), size)]
        return [self.part(batch.pixels[rows], captions[rows], negatives[rows]) for rows in chosen]

    def part(self, pixels: np.ndarray, captions: Sequence[str], negatives: Sequence[Sequence[str]]) -> Part:
        ids = self.tokenizer([*captions, *_together(negatives)])
        pixels_nHW3, ids_nL = (copied_to(value, self.world.device) for value in (torch.from_numpy(pixels), without_padding(ids)))
        return Part(pixels_nHW3.permute(0, 3, 1, 2), ids_nL)

    def backward(self, parts: Sequence[Part], negatives: Sequence[int]) -> Tensor:
        """Add the gradients of this process's micro-batches; returns the loss of the batch.

        Args:
            negatives: number of hard negatives of each pair of the batch.
        """
        world = self.world
        # 1. The vectors of the whole batch; those of a single micro-batch keep their graph.
        alone = len(parts) == 1
        with torch.set_grad_enabled(alone):
            own = [self.embed(part) for part in parts]
        kinds = zip(*(vectors.parts() for vectors in own), strict=True)
        images_nd, texts_nd, negatives_md = (world.concatenate(torch.cat(kind).detach()).requires_grad_() for kind in kinds)
        # 2. The loss, and its gradient at the vectors. Every process computes the same, so the scale's is divided among them.
        owners = [row for row, count in enumerate(negatives) for _ in range(count)]
        owners_m = torch.tensor(owners, dtype=torch.long, device=world.device)
        scale = self.model.logit_scale.exp()
        loss = contrastive_loss(images_nd, texts_nd, negatives_md, owners_m, scale)
        loss.backward()
        self.model.logit_scale.grad /= world.size
        # 3. From the vectors on to the parameters.
        row = world.share(len(negatives)).start
        hard = sum(negatives[:row])
        for part, kept in zip(parts, own, strict=True):
            vectors = kept if alone else self.embed(part)
            n, m = len(vectors.images_nd), len(vectors.words_md) - len(vectors.images_nd)
            words_md = torch.cat([_gradient(texts_nd)[row : row + n], _gradient(negatives_md)[hard : hard + m]])
            torch.autograd.backward([vectors.images_nd, vectors.words_md], [_gradient(images_nd)[row : row + n], words_md])
            row, hard = row + n, hard + m
        return loss.detach()

    def embed(self, part: Part) -> Vectors:
        """Vectors, float32, of a micro-batch."""
        with autocast(self.config, self.world.device):
            words_md = embed_ids(self.model, part.ids).float()
            return Vectors(embed_pixels(self.model, part.pixels).float(), words_md)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        network = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        return {**network, **state_tensors([self.optimizer], names)}

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing: captions follow from the step."""


def _together(texts: Sequence[Sequence[str]]) -> list[str]:
    return [text for own in texts for text in own]


def _gradient(vectors: Tensor) -> Tensor:
    return torch.zeros_like(vectors) if vectors.grad is None else vectors.grad


def train(
    config: EncoderConfig,
    images: Images,
    captions: Sequence[Sequence[str]],
    seed: int,
    world: World = ALONE,
    log: Log = lambda metrics, step: None,
    checkpoints: Checkpoints | None = None,
) -> Encoder:
    """Train an encoder on images and their captions, one of each image's at random in every batch; see :func:`loop.train`.

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
    tokenizer = ClipTokenizer(TextTokenizer.train(_together(captions), config.vocabulary_size), config.context_length)
    trainer = EncoderTrainer(config, images, captions, tokenizer, seed, world)
    loop.train(trainer, config.steps, "encoder", world, log, checkpoints)
    return Encoder(trainer.model, trainer.settings, trainer.tokenizer)


def step_memory(config: EncoderConfig, processes: int) -> StepMemory:
    """The memory of a step on each of ``processes`` GPUs, with captions of full length."""
    config = on_a_gpu(config)
    tokenizer = ClipTokenizer(_Vocabulary(config.vocabulary_size), config.context_length)  # type: ignore[arg-type]
    trainer = EncoderTrainer(config, np.zeros((2, 1, 1, 3), np.uint8), [], tokenizer, 0, DryWorld(0, processes))
    share, rows, each = config.batch_size // processes, micro_batch(config, processes), 1 + config.hard_negatives

    def backward() -> None:
        parts = [
            Part(
                torch.empty(rows, 3, config.image_size, config.image_size, dtype=torch.uint8),
                torch.empty(rows * each, config.context_length, dtype=torch.long),
            )
            for _ in range(-(-share // rows))
        ]
        trainer.backward(parts, [config.hard_negatives] * (rows * len(parts) * processes))

    return measure(backward, trainer.model.parameters(), trainer.tensors().values())


@dataclass(frozen=True)
class _Vocabulary:
    """A text tokenizer of which only the size is needed."""

    size: int


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
