"""The ranks of a run: their group, signs of life, and a watchdog."""
