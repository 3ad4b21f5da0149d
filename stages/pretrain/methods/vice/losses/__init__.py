"""ViCE's own losses: pooling of regions and the swapped prediction. They import torch and shared losses only."""
