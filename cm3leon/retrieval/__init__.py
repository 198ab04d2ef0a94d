"""The memory bank of embeddings and the rules by which documents are retrieved from it."""
