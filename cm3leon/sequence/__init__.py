"""Token sequences: vocabulary and grammar, CM3 masking, task templates, text tokenizer."""
