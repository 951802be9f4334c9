"""Other people's work against ours: simulators, published silicon, format libraries and exact rationals.

Nothing here is a second copy of `quant`: every expected value comes from a foreign library, from foreign measurements
or from `tests/third/exact.py`, which works on fractions and imports nothing of this project.
"""
