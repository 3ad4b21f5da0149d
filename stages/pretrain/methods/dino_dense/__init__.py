"""DINO with dense alignment: settings.py and method.py. Imports methods/dino, which it extends, and methods/shared."""
