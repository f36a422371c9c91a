"""Submissions: the predicted prices that a nightly job publishes, and the checks that they must pass before."""
