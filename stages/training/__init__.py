"""Training with a plain PyTorch loop: the loop, its contract, optimiser, schedules, checkpoints, watch and collectives.

Imports the pipeline's contract and errors and stages/models; no stage, no Ray. Open to every stage.
"""
