"""Starts the training of the `pretrain` stage: in the driver or on Ray Train, from inputs to the artifact's files.

Imports every other room of pre-training; none of them imports it.
"""
