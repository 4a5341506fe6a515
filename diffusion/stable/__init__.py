"""Stable Diffusion v1 in Flax NNX: text encoder, tokenizer, autoencoder and U-Net as published."""
