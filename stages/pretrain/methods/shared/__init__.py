"""What several methods share: the student and its teacher, overlaps of crops, pairs of images, colours.

Imports losses, views and `stages/models`, but no method.
"""
