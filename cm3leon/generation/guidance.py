"""Guidance: the logits of a conditional stream, extrapolated away from those of streams that know less of the request.

Pure functions of tensors of one shape. In the equations l_c are the logits of the conditional stream, l_u those of the unconditional one.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

Schedule = Literal["constant", "linear", "cosine"]


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance, ``l = l_u + scale * (l_c - l_u)`` (arXiv 2309.02591, section 3.1; Gafni et al. 2022, arXiv 2203.13131)."""
    return unconditional.lerp(conditional, scale)


def editing(full: Tensor, image: Tensor, unconditional: Tensor, image_scale: float, text_scale: float | Tensor) -> Tensor:
    """Guidance of editing by three streams: image and instruction (full), the image alone (I), and neither (u).

    ``l = l_u + s_I * (l_I - l_u) + s_T * (l_full - l_I)`` (InstructPix2Pix, arXiv 2211.09800, equation 3).
    """
    return unconditional + image_scale * (image - unconditional) + text_scale * (full - image)


def scale_at(schedule: Schedule, scale: float, progress: Tensor) -> float | Tensor:
    """The guidance scale at ``progress`` in [0, 1] of an image: always ``scale``, or rising to it from 1, linearly or by half a cosine."""
    if schedule == "constant":
        return scale
    return 1 + (scale - 1) * (progress if schedule == "linear" else (1 - (math.pi * progress).cos()) / 2)
