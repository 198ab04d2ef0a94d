"""Training of the decoder, the VQ-GAN, the CLIP encoder and the upscaler: loop, optimizers, checkpoints, processes."""
