"""DSA's own losses: the arranging module and the scoring module. They import torch only."""
