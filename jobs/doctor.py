"""Runs fusion/jobs/doctor.py of this checkout, whether or not Fusion is installed."""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])
runpy.run_module("fusion.jobs.doctor", run_name="__main__")
