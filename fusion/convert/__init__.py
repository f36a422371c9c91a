"""Embeddings of other tools, brought to the layout that training reads: `python -m fusion.convert`."""
