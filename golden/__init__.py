"""Goldens: data that the rest is held to. `python -m golden` verifies, regenerates and captures them."""
