"""Labelled images as batches, a function of the step: where an image lies in its crop, how masks and boxes follow.

Imports stages/data and stages/training; no model.
"""
