"""D3SSL's own loss: the contrast of regions against a memory bank. It imports torch only."""
