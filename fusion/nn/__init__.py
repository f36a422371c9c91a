"""The networks: layers, the price model around them, and its labelled neighbours."""
