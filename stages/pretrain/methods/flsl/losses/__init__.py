"""FLSL's own losses: the mean-shift and the three terms. They import torch only."""
