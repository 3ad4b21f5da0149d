"""Views: what a method asks for (plan), drawn as numbers (draw), made into pixels (two renderers), with their geometry.

Imports numpy, OpenCV and torch; of this project only stages/data, and sheet.py the `Batch` that it shows.
"""
