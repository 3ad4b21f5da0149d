"""The stages `embeddings` and `features`: one vector per image, or one per patch too, by a frozen encoder.

May import `stages.data`, `stages.map_images` and `stages.models`.
"""
