"""Scripts that measure speed, memory and the quality of single parts: `python -m lab.studies.NAME`."""
