"""The pre-training methods: the contract (method.py), one folder for each method, and what several of them share.

A method imports losses, views, `stages/models` and `stages/training`, but never Ray and no other method. One exception:
`dino_dense` extends `dino`. (`dsa` wraps any other method, which it finds by its name in the config.)
"""
