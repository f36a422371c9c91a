"""Converts embeddings of other tools to the layout that training reads: `python -m fusion.convert`."""
