"""The tasks of a model by the names that they have in configuration, Python, commands, HTTP, the registered model and records.

The instruction-tuning tasks are those of ``cm3leon.sequence.tasks.TASKS``; the others come with pretraining, except ``upscale``, which the
upscaler does. Imports nothing, so that a command's help needs no model code.
"""

from __future__ import annotations

GENERATOR_TASKS = (
    "text_to_image", "write", "layout_to_image", "condition_to_image", "edit", "infill", "infill_text",
    "caption", "long_caption", "vqa", "reasoning", "interleave", "score", "upscale",
)  # fmt: skip
"""Each is also the name of a method of :class:`~cm3leon.generation.generator.Generator`."""

FORMER_NAMES = {"answer": "vqa", "reason": "reasoning"}
"""Names of earlier versions, which requests may still use, and those of today."""
