"""Which folders of the checkout are which packages of the wheel; everything else is in pyproject.toml.

A checkout has the folders of the product at its top, where people look for them. In a wheel they lie in megaproof/.
"""

from __future__ import annotations

if __name__ == "megaproof.setup":
    raise ImportError("megaproof.setup is a checkout's file for building wheels: import megaproof")

from setuptools import find_packages, setup

ROWS = ("toolchain", "quant", "reference", "kernel", "cases", "golden", "proof", "bench")
DATA = ("cpp", "cu", "cuh", "hpp", "json", "md", "safetensors", "svg")
"""Kinds of file that are read at run time, wherever below a row they lie."""

packages = find_packages(include=[name for row in ROWS for name in (row, f"{row}.*")])
setup(
    packages=["megaproof", *(f"megaproof.{package}" for package in packages)],
    package_dir={f"megaproof.{row}": row for row in ROWS},
    package_data={
        "megaproof": ["py.typed"],
        **{f"megaproof.{row}": [f"**/*.{kind}" for kind in DATA] for row in ROWS},
    },
    include_package_data=False,
)
