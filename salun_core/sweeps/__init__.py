"""Sweeps: batches of deletion requests from claim to settlement."""
