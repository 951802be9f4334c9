"""The floor of the house: the toolchain knows no kernel, no layer and no number of either."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from megaproof import HOME

MODULES = sorted((HOME / "toolchain").glob("*.py"))
ROOMS = sorted(path.name for path in HOME.iterdir() if (path / "__init__.py").is_file())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_it_imports_itself_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            top, _, below = name.partition(".")
            assert top not in set(ROOMS) - {"megaproof"}, f"{path.name} imports {name} under its bare name"
            if top == "megaproof" and below.partition(".")[0] in ROOMS:
                assert below.startswith("toolchain"), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_it_names_no_file_of_another_room(path: Path) -> None:
    """Data that is read by path counts as an import: paths come with a `Program` or with `Pins`."""
    nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    words = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert [word for word in words if word in {*ROOMS} - {"megaproof", "toolchain"}] == []
    assert not any(isinstance(node, ast.Name) and node.id == "HOME" for node in nodes)
