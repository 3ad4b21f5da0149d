"""FLSL: settings.py, method.py, its choice of query tokens and its losses. Imports methods/shared and shared losses."""
