"""Where the image with an id lies, by a template such as ``images/{image_id:012d}.jpg``."""

from __future__ import annotations

from cm3leon.data.sources import SourceError


class _ImageId(str):
    """An id that a format of numbers takes for its number."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return format(int(self), spec) if spec else str(self)


def image_path(template: str, image_id: int | str) -> str:
    """The path of an image, relative to the collection's root.

    Args:
        template: of the parameters, which check that it names ``{image_id}`` and nothing else.

    Raises:
        SourceError: if the template wants a number, and the id is none.
    """
    try:
        return template.format(image_id=_ImageId(image_id))
    except ValueError:
        raise SourceError(f"image_id {image_id!r} is no number, which {template} takes it for: write {{image_id}} there") from None
