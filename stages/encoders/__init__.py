"""The `encoder` stage: an encoder that no stage has trained, as an artifact like those that are trained.

Imports of stages only `models`.
"""
