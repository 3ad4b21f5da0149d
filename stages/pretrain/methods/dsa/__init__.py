"""DSA: settings.py, method.py and its losses. Imports the contract of methods and `stages/models`, and no host."""
