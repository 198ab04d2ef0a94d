"""What all classes of parameters have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Section(BaseModel):
    """Base of all parameter classes: unknown keys are errors, numbers are finite, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""Seeds that NumPy and PyTorch both accept."""


def first_error(error: ValidationError) -> str:
    """Key and fault of the first error, for the message of a check that validates a part of a section by itself."""
    first = error.errors()[0]
    fault = "unknown key" if first["type"] == "extra_forbidden" else f"{first['msg']} (found {first['input']!r})"
    return f"{'.'.join(map(str, first['loc']))}: {fault}"
