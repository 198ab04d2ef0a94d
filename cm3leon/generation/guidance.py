"""Classifier-free guidance: logits of the conditional stream pushed away from those of the mask-conditioned one."""

from __future__ import annotations

from torch import Tensor


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """l_u + scale * (l_c - l_u) (paper, section 3.1; Gafni et al. 2022)."""
    return unconditional + scale * (conditional - unconditional)
