"""From a collection to batches: manifest, images, validation, splits, token shards, sequences."""
