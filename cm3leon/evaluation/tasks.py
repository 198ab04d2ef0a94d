"""The tasks that have a measurement of their own; ``run.py`` also measures text_to_image, caption and vqa, which share prompts."""

from __future__ import annotations

from collections.abc import Callable

from cm3leon.evaluation.context import Evaluation, Sheet
from cm3leon.evaluation.image_tasks import condition, edit, layout, write
from cm3leon.evaluation.text_tasks import long_caption, reasoning

MEASURES: dict[str, Callable[[Evaluation], Sheet]] = {
    "edit": edit,
    "layout_to_image": layout,
    "condition_to_image": condition,
    "write": write,
    "long_caption": long_caption,
    "reasoning": reasoning,
}
"""By the task that a model must have been tuned for. Inpainting is learned in pretraining and measured for every model."""
