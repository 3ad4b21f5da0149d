"""DINO: settings.py and method.py. Imports methods/shared and the shared losses."""
