"""Ablation: measures how much each source lowers the SMAPE of a run, with `python -m fusion.ablation`."""
