"""Retention: inventory, rules, plan, purge and addenda."""
