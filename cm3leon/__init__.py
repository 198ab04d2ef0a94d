"""cm3leon: an open, reproducible CM3leon, from a licensed image-text collection to a promoted model."""
