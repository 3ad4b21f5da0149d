"""Losses and operators that several methods use; a loss of one method lives in that method's folder.

A loss imports torch, the standard library and other losses, nothing else.
"""
