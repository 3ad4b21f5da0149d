"""Trains an encoder further with labels, end to end, and tests it: classification, segmentation, detection.

Imports of stages `data`, `models` and `training`; no other stage. Planning reads the stage files and their settings.
"""
