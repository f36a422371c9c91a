"""Training: reads embeddings, trains a model on any number of ranks, and commits it as checkpoints."""

from fusion.training.loop import train

__all__ = ["train"]
