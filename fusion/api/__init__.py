"""The way in from Python: `fusion.load`, `Model.predict`, `fusion.train` and `fusion.score`, for notebooks and scripts.

Each does what a command does, with the same code, and gives data frames. Nothing is printed on standard output; what
is wrong is raised as a `FusionError`, which says what to do about it.
"""

import sys

from fusion.environment import prepare_libraries, prepare_threads

if "torch" not in sys.modules:  # as before a command: the libraries read these variables when torch loads them
    prepare_libraries()
    prepare_threads()
