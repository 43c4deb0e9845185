"""Bench suites: methods side by side on one model and one forget set, measured cell by cell and resumable."""
