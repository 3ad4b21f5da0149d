"""What a run would do, and why: fingerprints, sources, history. Imports config and store; neither Ray nor MLflow."""
