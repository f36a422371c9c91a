"""Prediction: computes prices for the rows of a table, in parts that are saved so that a stopped job can resume."""

from fusion.prediction.predict import predict_test

__all__ = ["predict_test"]
