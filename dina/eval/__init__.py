"""Judges independent of the model, metrics with intervals, and the scores of a trained experiment."""
