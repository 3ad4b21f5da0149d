"""The stages `selective_search` (boxes) and `superpixels` (label maps), each with its algorithm on one image.

May import `stages.data` and `stages.map_images`.
"""
