"""The networks: decoder, image tokenizer (VQ-GAN), CLIP encoder, upscaler; and conversion from and to OPT."""
