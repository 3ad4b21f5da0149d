"""One function over every image of an artifact, on Ray Data: images in, one output table out.

May import `stages.data`, the stage contract, and the store's two faces.
"""
