"""Verbs that the laboratory adds to `salun`, by the entry points `salun.verbs` of pyproject.toml."""
