"""Losses of the hosts that lightly does not have, or has in another form. They import torch only."""
