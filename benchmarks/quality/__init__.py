"""How well peers and Fusion's runs predict prices, on the same grouped folds; see `__main__.py` for the command."""
