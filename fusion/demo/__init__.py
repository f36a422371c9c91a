"""The main job on a generated catalog: `python -m fusion.demo`."""
