"""Files of the product that are collected from a checkout, as the gate is, under their one name.

There the folder proof/ has no package around it, so pytest would call the file proof.gate and its package proof, which
are second modules beside megaproof.proof. In a wheel pytest finds the name by itself.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from megaproof import HOME
from megaproof.proof.loaded import FOLDERS


class ProductModule(pytest.Module):
    """A file of the product, loaded as megaproof.<folder>.<module>."""

    def _getobj(self) -> ModuleType:
        return importlib.import_module(".".join(("megaproof", *self.path.relative_to(HOME).with_suffix("").parts)))


def module(path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """The collector of a file of the product; None for any other file, which is pytest's own matter."""
    return ProductModule.from_parent(parent, path=path) if _in_product(path) else None


def directory(path: Path, parent: pytest.Collector) -> pytest.Dir | None:
    """The collector of a folder of the product: a plain one, which does not load the package; None for any other."""
    return pytest.Dir.from_parent(parent, path=path) if _in_product(path) else None


def _in_product(path: Path) -> bool:
    return path.is_relative_to(HOME) and path.relative_to(HOME).parts[:1] in [(folder,) for folder in FOLDERS]
