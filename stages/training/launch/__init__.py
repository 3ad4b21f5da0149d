"""Starts a training: in the driver's own process or on Ray Train, from the inputs to the artifact's files.

Imports the pipeline's contract, stages/training and Ray; a stage says by a `Launch` (work.py) what it trains.
"""
