"""`tessera compare`: from the metrics of a pipeline's evaluations to one table of encoders and protocols.

Imports of pipeline `config`, `plan`, `stage` and `store`; only `cli` imports it.
"""
