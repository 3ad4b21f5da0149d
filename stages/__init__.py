"""What a pipeline's steps do: a folder for each stage, and four that all may use: data, models, map_images, training.

A stage imports those four and of the pipeline its contract (stage, errors, registry, Artifact, ArtifactWriter).
"""
