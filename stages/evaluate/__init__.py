"""Evaluation of frozen encoders: the stages `classify_knn` and `segment_linear`, and measures that are no stage yet.

Imports `stages.data`, `stages.models` and the pipeline's contract; no other room.
"""
