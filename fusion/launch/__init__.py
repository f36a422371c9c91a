"""The launcher: starts the ranks of a command on one node or on several, with `python -m fusion.launch`."""
