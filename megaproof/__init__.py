"""megaproof: whether a fused Hopper FP8 MegaMoE kernel computes its numeric recipe, to the last bit.

Everything is imported as `megaproof.<folder>`. In a wheel the folders lie inside this one. In a checkout they lie
beside it, at the top, where people look for them; there the checkout's root becomes a part of this package's path.
"""

from __future__ import annotations

from pathlib import Path

if __name__ != "megaproof":
    raise ImportError(f"{__name__} is megaproof itself: import megaproof")

__version__ = "0.2.0.dev0"

HOME = Path(__file__).resolve().parent
"""Where the folders of the product are: the checkout's root, or the installed package."""


def _is_checkout(folder: Path) -> bool:
    """Whether `folder` is the root of a checkout: it holds this project's own pyproject.toml."""
    try:
        return '\nname = "megaproof"\n' in (folder / "pyproject.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


if _is_checkout(HOME.parent):
    HOME = HOME.parent
    __path__.append(str(HOME))
