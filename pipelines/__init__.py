"""The pipelines, their compiler and their local runner: `python -m pipelines --help`."""
