"""The batches of pre-training, a function of the step: which images, how each is read and cut, how they are stacked.

Imports the views room, stages/data and the pipeline's errors; no method.
"""
