"""Makes torchvision importable with a torch whose build it was not compiled for.

torchvision from a general package index is a CUDA build. With a CPU-only torch its C++ library does not load, the operators it would
define are missing, and ``import torchvision`` fails with ``operator torchvision::nms does not exist``; so do open_clip and transformers.
They need only the schemas of the operators, because transforms never call them.

Call :func:`make_importable` before importing torchvision, open_clip or transformers. If torchvision works it does nothing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
SCHEMAS = (f"nms{SIGNATURE}", f"qnms{SIGNATURE}")

_library: Any = None  # the definitions exist as long as this object


def _native_library_loads(package: Path) -> bool:
    """True if torchvision's own C++ library can be loaded; loading it again at import is harmless."""
    import torch

    for path in sorted(package.glob("_C*.so")) + sorted(package.glob("_C*.pyd")) + sorted(package.glob("_C*.dylib")):
        try:
            torch.ops.load_library(str(path))
            return True
        except (ImportError, OSError):
            continue
    return False


def make_importable() -> bool:
    """Define torchvision's operator schemas if its C++ library does not load; returns whether that was necessary (now or earlier)."""
    global _library
    if _library is not None:
        return True
    import torch

    spec = importlib.util.find_spec("torchvision")  # finds the package without importing it
    if spec is None or spec.origin is None:
        return False
    if hasattr(torch.ops.torchvision, "nms") or _native_library_loads(Path(spec.origin).parent):
        return False
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _library = library
    return True
