"""A complete example on a generated catalog: `python -m fusion.demo`."""
