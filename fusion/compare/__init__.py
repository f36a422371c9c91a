"""Compares runs on the rows that all of them validated on: `python -m fusion.compare`."""
