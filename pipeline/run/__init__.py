"""Executing a plan: Ray, MLflow and what the terminal shows meanwhile. Imports config, plan and store."""
