"""Unlearning methods and the resumable loop that runs them."""
