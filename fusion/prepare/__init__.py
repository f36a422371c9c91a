"""Brings sources of any layout into the one that training reads; see `python -m fusion.prepare --help`."""
