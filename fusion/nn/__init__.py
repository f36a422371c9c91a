"""The networks: layers, the price model around them, and its kernel regression on labelled neighbours."""
