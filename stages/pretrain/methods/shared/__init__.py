"""What several methods share: the student and its teacher, overlaps of crops, pairs of images, colours.

Imports the contract (methods/method.py), losses, views and `stages/models`, but no method's folder.
"""
