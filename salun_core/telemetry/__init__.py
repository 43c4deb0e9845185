"""Metrics and logs: names, labels and redaction in one place each."""
