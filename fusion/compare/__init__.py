"""Runs side by side on the rows that all of them validated on: `python -m fusion.compare`."""
