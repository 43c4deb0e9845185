"""The demo: train a model, file deletion requests, sweep, and verify the certificates."""
