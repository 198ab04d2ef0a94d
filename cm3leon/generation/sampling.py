"""Sampling the next token: temperature, top-k, top-p, contrastive decoding, and noise that belongs to a row, not to a batch.

Functions take logits or probabilities (..., V) and return the same shape. Shapes: S streams of guidance, P prompts, C candidates of each,
T tokens of each, V image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cm3leon.generation.guidance import classifier_free, editing, scale_at

if TYPE_CHECKING:
    from cm3leon.config.schema import DecodingConfig


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
    """Only the ``k`` most likely tokens, and those as likely as the k-th, normalized to sum to 1."""
    least = probabilities.topk(min(k, probabilities.shape[-1])).values[..., -1:]
    kept = probabilities.masked_fill(probabilities < least, 0)
    return kept / kept.sum(-1, keepdim=True)


def keep_top_p(probabilities: Tensor, p: float) -> Tensor:
    """Nucleus sampling: only the smallest set of most likely tokens whose mass reaches ``p``, and those as likely as its last, normalized.

    Holtzman et al. 2020, arXiv 1904.09751. The most likely token always stays.
    """
    # A token is in the nucleus if the mass of those before it is still below p.
    descending = _sorted(probabilities).flip(-1)
    needed = (descending.cumsum(-1) - descending < p).sum(-1, keepdim=True).clamp(min=1)
    kept = probabilities.masked_fill(probabilities < descending.gather(-1, needed - 1), 0)
    return kept / kept.sum(-1, keepdim=True)


def _sorted(values: Tensor) -> Tensor:
    """In ascending order. NumPy's sort on a CPU: torch's also computes the permutation, which takes ten times as long."""
    return torch.from_numpy(np.sort(values.numpy())) if values.device.type == "cpu" else values.sort(-1).values


def contrastive(conditional: Tensor, unconditional: Tensor, k: int, alpha: float) -> Tensor:
    """CD-K: ``score(t) = log p_c(t) - log p_u(t)`` where ``p_c(t) >= alpha * (k-th largest p_c)``, else -inf.

    Source: arXiv 2309.02591, section 3.1.2. With ``k`` 1 it is contrastive decoding (Li et al., arXiv 2210.15097), whose terms are used
    here: the conditional stream is the expert, the unconditional one the amateur.
    """
    expert, amateur = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    # Without this threshold a token that both find unlikely could have the best difference.
    least = expert.topk(min(k, expert.shape[-1])).values[..., -1:]
    implausible = expert.exp() < alpha * least.exp()
    return (expert - amateur).masked_fill(implausible, -torch.inf)


def sample(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Sample by inverting the cumulative distribution at one uniform number a row; token indices (...,) int64."""
    # In float64: the rounding errors of a float32 sum over thousands of tokens would give zero-probability tokens mass.
    cumulative = probabilities.double().cumsum(-1)
    # The last sum is 1 up to rounding; scaling by it keeps the threshold inside.
    threshold = uniform.to(cumulative.device)[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=probabilities.shape[-1] - 1)


@dataclass(frozen=True)
class Sampler:
    """The distribution of an image's next token, from the logits of its streams of guidance.

    One stream: the conditional. Two: conditional, unconditional. Three, for editing: image and instruction, image, neither.

    Attributes:
        contrasted: how many candidates, the last ones, are sampled by CD-K; None: the settings' share of those that are sampled together.
    """

    settings: DecodingConfig
    contrasted: int | None = None

    def of_batch(self, numbers: Sequence[int], count: int) -> Sampler:
        """For a batch with the candidates of these numbers, of ``count`` in all: how a candidate is sampled depends on its number alone."""
        first = count - round(self.settings.contrastive * count)
        return replace(self, contrasted=sum(number >= first for number in numbers))

    def streams_needed(self, available: int) -> int:
        """How many of a request's streams these settings need: without guidance only the conditional one, which comes first."""
        settings = self.settings
        unguided = settings.guidance == 1 and settings.contrastive == 0 and (available < 3 or settings.image_guidance == 1)
        return 1 if unguided else available

    def probabilities(self, logits_SPCTV: Tensor, progress_PCT: Tensor) -> Tensor:
        """Probabilities (P, C, T, V) of tokens.

        Args:
            progress_PCT: share of the image that precedes each token, in [0, 1].
        """
        settings, candidates = self.settings, logits_SPCTV.shape[2]
        contrasted = round(settings.contrastive * candidates) if self.contrasted is None else self.contrasted
        guided_SPCTV, contrasted_SPCTV = logits_SPCTV.split([candidates - contrasted, contrasted], dim=2)
        groups = []
        if candidates > contrasted:
            # Guidance, temperature, top-k, top-p, in this order.
            found_PCTV = at_temperature(self._guided(guided_SPCTV, progress_PCT[:, : candidates - contrasted]), settings.temperature)
            found_PCTV = found_PCTV if settings.top_k is None else keep_top_k(found_PCTV, settings.top_k)
            groups.append(found_PCTV if settings.top_p == 1 else keep_top_p(found_PCTV, settings.top_p))
        if contrasted:
            # CD-K has its own threshold of plausibility in place of top-k and top-p.
            scores_PCTV = contrastive(contrasted_SPCTV[0], contrasted_SPCTV[-1], settings.contrastive_k, settings.contrastive_alpha)
            groups.append(at_temperature(scores_PCTV, settings.temperature))
        return torch.cat(groups, 1)

    def _guided(self, logits_SPCTV: Tensor, progress_PCT: Tensor) -> Tensor:
        """Logits (P, C, T, V) after guidance."""
        scale = scale_at(self.settings.guidance_schedule, self.settings.guidance, progress_PCT.unsqueeze(-1))
        if len(logits_SPCTV) == 1:
            return logits_SPCTV[0]
        if len(logits_SPCTV) == 2:
            return classifier_free(logits_SPCTV[0], logits_SPCTV[1], scale)
        return editing(logits_SPCTV[0], logits_SPCTV[1], logits_SPCTV[2], self.settings.image_guidance, scale)
