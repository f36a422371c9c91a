"""Starts the ranks of a command on one node or on several: `python -m fusion.launch`."""
