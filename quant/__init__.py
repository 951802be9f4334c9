"""The numbers: recipe, formats, scales, casts and the hardware atoms. See `quant/recipe.py` first."""
