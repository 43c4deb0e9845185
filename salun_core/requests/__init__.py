"""Deletion requests: what they say, when they are due, the states they pass through, and the ledger that keeps them."""
