"""Networks that several rooms need: the encoder with its files and settings, decoders, heads, norms.

Open to all rooms of `stages`; imports none of them, and of the pipeline only the contract.
"""
