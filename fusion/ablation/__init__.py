"""What each source is worth to a run: `python -m fusion.ablation`."""
