"""Who may import whom: a row of the house imports only rows above it, and the two wings stay apart.

Imports for type checkers count too: whoever reads a name needs the module it comes from. Data read by path count as
imports. `__main__.py` files are façades and exempt: `python -m reference` may show what the court derives.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from megaproof.tests.support.house import PRODUCT, ROOT, ROWS, imported, modules, tree


def allowed(path: Path) -> set[str]:
    """The rows that this file may import."""
    row, *rest = path.relative_to(ROOT).parts
    above = set(ROWS[: ROWS.index(row) + 1])
    if row == "kernel" and rest[0] != "baseline":
        above.discard("reference")  # what both wings need is in quant, or is written twice and compared
    if (row, *rest[:1]) == ("reference", "oracle"):
        above = {"reference"}
    return above


def row_of(name: str) -> str | None:
    """The row that an imported name belongs to, or None if it is not ours."""
    first, _, rest = name.partition(".")
    if first != "megaproof":
        return None
    second = rest.partition(".")[0]
    return second if second in ROWS else "megaproof"


def read_by_path(path: Path) -> Iterator[tuple[int, str]]:
    """(line, row) of every path that this file builds into a row: `... / "quant" / "twin.cu"`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
            first = str(node.right.value).partition("/")[0]
            if first in ROWS:
                yield node.lineno, first


SOURCES = [path for path in modules(*PRODUCT) if path.name != "__main__.py"]


@pytest.mark.parametrize("row", PRODUCT)
def test_a_row_imports_only_rows_above_it(row: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] == row
        for line, name in imported(path)
        if row_of(name) and row_of(name) not in allowed(path)
    ]
    assert found == []


def test_data_are_read_only_from_rows_above() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} reads from {row}/"
        for path in SOURCES
        for line, row in read_by_path(path)
        if row not in allowed(path)
    ]
    assert found == []


def test_ours_is_imported_under_one_name() -> None:
    """`from quant import ...` would load a module a second time, with exceptions and registries of its own."""
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(*ROWS)
        for line, name in imported(path)
        if name.partition(".")[0] in ROWS[1:]
    ]
    assert found == []


def test_no_test_module_is_imported() -> None:
    """What two test files need is in tests/support."""
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(*ROWS)
        for line, name in imported(path)
        if name.startswith("megaproof.tests.") and any(part.startswith("test_") for part in name.split(".")[2:-1])
    ]
    assert found == []


def test_the_product_mocks_nothing() -> None:
    """Where a changed kernel is needed, a seam is: Program(defines=, edit=)."""
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in modules(*PRODUCT)
        for line, name in imported(path)
        if name.startswith("unittest")
    ]
    assert found == []


def names_of_classes(path: Path) -> Iterator[str]:
    """Public classes of a module's top level."""
    yield from (n.name for n in tree(path).body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))


def test_a_class_name_has_one_meaning() -> None:
    """Two classes of one name are two ideas, or one idea written twice."""
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for name in names_of_classes(path):
            places.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from megaproof.quant.recipe import Recipe", ["megaproof.quant.recipe", "megaproof.quant.recipe.Recipe"]),
        ("from . import recipe", ["megaproof.quant", "megaproof.quant.recipe"]),
        ("from ..kernel import api", ["megaproof.kernel", "megaproof.kernel.api"]),
        ("def f():\n    import megaproof.proof.run", ["megaproof.proof.run"]),
    ],
)
def test_imports_are_found(source: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "quant" / "an_example.py"
    monkeypatch.setattr("megaproof.tests.support.house.tree", lambda _: ast.parse(source))
    assert [name for _, name in imported(path)] == found
