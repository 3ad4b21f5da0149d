"""What every stage may use: the tables that stages exchange, readers of their rows, pixels, and pictures of them.

Imports no other folder of `stages`, and of `pipeline` only the errors and the store's two faces.
"""
