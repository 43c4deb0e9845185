"""What each difference from the published code changes, both sides measured here: `python -m benchmarks.deviations`."""
