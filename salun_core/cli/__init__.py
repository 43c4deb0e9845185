"""The `salun` command: one file a group of verbs, adapters only; the work is done by `salun_core.steps`."""
