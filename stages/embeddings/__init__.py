"""The stage `embeddings`: one vector per image, by a frozen encoder.

May import `stages.data`, `stages.map_images` and `stages.models`.
"""
