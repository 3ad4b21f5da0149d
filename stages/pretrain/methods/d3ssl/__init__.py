"""D3SSL: settings.py, method.py, views and proposals drawn by the loader, masks and losses. Imports methods/shared."""
