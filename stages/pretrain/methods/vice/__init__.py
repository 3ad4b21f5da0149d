"""ViCE: settings.py, method.py, the views and regions that the loader draws, losses. Imports shared/ and losses/."""
