"""The stage `neighbors`: the most similar other images of every image, found with FAISS.

May import `stages.data`.
"""
