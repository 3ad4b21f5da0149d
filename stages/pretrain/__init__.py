"""Pre-training: the `pretrain` stage, its config, its data, views, methods and losses, and how it is launched.

Imports stages/models, stages/data and stages/training, and of the pipeline what any stage may; no other stage.
"""
