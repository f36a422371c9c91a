"""Checks that a bucket holds what was written: `python -m fusion.verify`."""
