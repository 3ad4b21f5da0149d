"""CoTAP's own losses: the ranking loss, its baseline, and the prototype term. They import torch only."""
