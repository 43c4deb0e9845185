"""The steps of the pipeline as plain functions; the components and `salun run` call the same ones."""
