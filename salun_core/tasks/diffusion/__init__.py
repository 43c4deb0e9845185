"""The diffusion task."""
