"""The layer, readable: `reference/layer.py` top to bottom, `reference/equations.md` beside it."""
