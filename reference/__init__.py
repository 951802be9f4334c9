"""The layer, readable: `reference/layer.py` top to bottom, `reference/equations.md` beside it."""

from megaproof import bare

bare.refuse(__name__)
