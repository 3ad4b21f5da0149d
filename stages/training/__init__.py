"""Training with a plain PyTorch loop: the loop, its contract, optimiser, schedules, checkpoints, watch and collectives.

Imports the pipeline's contract and errors and stages/models; no stage, and Ray in launch/ only. Open to every stage.
"""
