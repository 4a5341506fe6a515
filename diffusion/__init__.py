"""Pixel diffusion in Flax NNX: noise schedules, the U-Net of published checkpoints, their files, and samplers."""
