"""What every stage may use: tables and readers of their rows, pixels and pictures; what tests are scored by, and units.

Imports no other folder of `stages`, and of `pipeline` the contract, the errors and the store's two faces.
"""
