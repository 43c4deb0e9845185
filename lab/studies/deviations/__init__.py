"""The effect of each difference from the published code, measured here: `python -m lab.studies.deviations`."""
