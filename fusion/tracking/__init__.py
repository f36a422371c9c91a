"""Sends what a training measures to other tools while it goes on: TensorBoard, MLflow, Weights & Biases, or your own.

A tracker is an object with the methods of `Tracker`. `--tracker package.module:factory` names a function without
arguments that returns one:

    class Printed:
        def start(self, run_id, config, folder): print(run_id)
        def epoch(self, number, metrics): print(number, metrics["smape"])
        def end(self, state, summary, report): print(state, summary)

Rank 0 alone calls it, in a thread of its own, so that a slow tracker does not delay the training. An error of a tracker
is logged once, and then it is not called any more; it never decides how the training ends.
"""

from fusion.tracking.choice import trackers_of as trackers_of
from fusion.tracking.follow import Followers as Followers
from fusion.tracking.follow import figures as figures
from fusion.tracking.follow import following as following
from fusion.tracking.protocol import Tracker as Tracker
