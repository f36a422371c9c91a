"""Runs a command: reads its settings, does its job, and turns errors into exit codes."""

from fusion.command.job import guarded, run

__all__ = ["guarded", "run"]
