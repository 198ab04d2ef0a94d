"""From a prompt to images or text: KV cache, guidance, sampling, ranking, and the generator on top of them."""
