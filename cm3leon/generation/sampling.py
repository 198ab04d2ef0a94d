"""Choosing the next token: temperature, top-k, top-p, contrastive decoding, and noise that belongs to a row, not to a batch.

Each function takes logits or probabilities (..., V) and returns the like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cm3leon.config.schema import DecodingConfig
from cm3leon.generation.guidance import classifier_free, editing, scale_at


def uniform_noise(seeds: Sequence[int], steps: int) -> Tensor:
    """One uniform number for each row and step, (rows, steps) float64; a row's numbers depend on its own seed alone."""
    rows = [torch.rand(steps, generator=torch.Generator().manual_seed(seed % 2**63), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows) if rows else torch.zeros(0, steps, dtype=torch.float64)


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities at a temperature; at 0 all mass is on the most likely token, the first of equals."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    return (logits.float() / temperature).softmax(-1)


def keep_top_k(probabilities: Tensor, k: int) -> Tensor:
    """Only the ``k`` most likely tokens, and those as likely as the k-th, scaled to sum to 1."""
    least = probabilities.topk(min(k, probabilities.shape[-1])).values[..., -1:]
    kept = probabilities.masked_fill(probabilities < least, 0)
    return kept / kept.sum(-1, keepdim=True)


def keep_top_p(probabilities: Tensor, p: float) -> Tensor:
    """Only the smallest set of most likely tokens whose mass reaches ``p``, and those as likely as its last, scaled to sum to 1.

    Holtzman et al. 2020, arXiv 1904.09751. The most likely token always stays.
    """
    descending = _sorted(probabilities).flip(-1)
    needed = (descending.cumsum(-1) - descending < p).sum(-1, keepdim=True).clamp(min=1)
    kept = probabilities.masked_fill(probabilities < descending.gather(-1, needed - 1), 0)
    return kept / kept.sum(-1, keepdim=True)


def _sorted(values: Tensor) -> Tensor:
    """Ascending. On a CPU NumPy's sort, as torch's also finds the order, which takes ten times as long."""
    return torch.from_numpy(np.sort(values.numpy())) if values.device.type == "cpu" else values.sort(-1).values


def contrastive(conditional: Tensor, unconditional: Tensor, k: int, alpha: float) -> Tensor:
    """CD-K: ``log p_c - log p_u`` where ``p_c >= alpha * (k-th largest p_c)``, else -inf (arXiv 2309.02591, section 3.1.2).

    With ``k`` 1 it is contrastive decoding (Li et al., arXiv 2210.15097).
    """
    expert, amateur = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    least = expert.topk(min(k, expert.shape[-1])).values[..., -1:]
    implausible = expert.exp() < alpha * least.exp()
    return (expert - amateur).masked_fill(implausible, -torch.inf)


def sample(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Invert the cumulative distribution at one uniform number a row; (..., ) int64."""
    cumulative = probabilities.double().cumsum(-1)
    threshold = uniform.to(cumulative.device)[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=probabilities.shape[-1] - 1)


@dataclass(frozen=True)
class Sampler:
    """How the next token of an image is chosen from the logits of its streams.

    One stream: the conditional. Two: conditional, unconditional. Three, for editing: image and instruction, image, neither.
    """

    settings: DecodingConfig

    def streams_of(self, known: int) -> int:
        """How many of the streams that a drawing has are needed with these settings; the conditional one comes first."""
        settings = self.settings
        plain = settings.guidance == 1 and settings.contrastive == 0 and (known < 3 or settings.image_guidance == 1)
        return 1 if plain else known

    def probabilities(self, logits_SPCV: Tensor, progress: float) -> Tensor:
        """Probabilities (P, C, V) from logits of S streams for P prompts with C candidates each.

        Args:
            progress: how much of the image is drawn, in [0, 1].
        """
        settings, candidates = self.settings, logits_SPCV.shape[2]
        by_contrast = round(settings.contrastive * candidates)
        plain, contrasted = logits_SPCV.split([candidates - by_contrast, by_contrast], dim=2)
        parts = []
        if candidates > by_contrast:
            found = at_temperature(self._guided(plain, progress), settings.temperature)
            found = found if settings.top_k is None else keep_top_k(found, settings.top_k)
            parts.append(found if settings.top_p == 1 else keep_top_p(found, settings.top_p))
        if by_contrast:
            scores = contrastive(contrasted[0], contrasted[-1], settings.contrastive_k, settings.contrastive_alpha)
            parts.append(at_temperature(scores, settings.temperature))
        return torch.cat(parts, 1)

    def _guided(self, logits_SPCV: Tensor, progress: float) -> Tensor:
        scale = scale_at(self.settings.guidance_schedule, self.settings.guidance, progress)
        if len(logits_SPCV) == 1:
            return logits_SPCV[0]
        if len(logits_SPCV) == 2:
            return classifier_free(logits_SPCV[0], logits_SPCV[1], scale)
        return editing(logits_SPCV[0], logits_SPCV[1], logits_SPCV[2], self.settings.image_guidance, scale)
