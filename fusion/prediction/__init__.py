"""Prediction: prices for the rows of a split, in parts that a stopped job keeps."""

from fusion.prediction.predict import predict_test

__all__ = ["predict_test"]
