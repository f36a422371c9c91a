"""Training: from embeddings to a committed model, on any number of ranks."""

from fusion.training.loop import train

__all__ = ["train"]
