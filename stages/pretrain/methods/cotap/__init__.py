"""CoTAP: settings.py, method.py and its losses. Imports methods/shared, the shared losses and `stages/models`."""
