"""What a config says about pre-training: the stage's own settings, every method's base, and parts that methods share.

Imports pydantic, the contract of stages and the settings of `stages/models` and `stages/training`, but never torch.
"""
