"""Erasure certificates: statement, envelope, keys, issue and verification."""
