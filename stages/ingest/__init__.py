"""The `ingest` stage: sources of images, one file a format, become artifacts of kind `images`.

Imports `stages.data` and the pipeline's contract; no other room.
"""
