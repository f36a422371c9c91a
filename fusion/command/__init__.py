"""How a command runs: its settings, its job, and how it ends."""

from fusion.command.job import guarded, run

__all__ = ["guarded", "run"]
