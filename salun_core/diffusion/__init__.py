"""Diffusion models: denoisers, conditions, latents, sampling and training."""
