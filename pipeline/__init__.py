"""Pipelines: stages and their artifacts, planned, run, stored and tracked.

Knows nothing of images or models, and imports nothing of `stages`: stage types are found through entry points.
"""
