"""Export for ``transformers``: ``export`` writes a directory; the other modules are copied into it, and import nothing of this package."""

__all__ = ["export"]
