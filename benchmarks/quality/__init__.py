"""Compares other models ("peers") with Fusion's runs on the same grouped folds; see `__main__.py` for the command."""
