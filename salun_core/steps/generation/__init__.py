"""The steps of a line of diffusion models: the same five, on images that are generated."""
