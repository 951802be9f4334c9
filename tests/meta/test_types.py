"""What mypy is asked (pyproject.toml), and how it finds the rows of a checkout (tests/support/typecheck.py)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from megaproof.tests.support.house import PRODUCT, ROOT
from megaproof.tests.support.typecheck import laid_out

NOT_STRICT = {
    "megaproof.quant.lanes": {"no-untyped-def", "operator"},
    "megaproof.quant.twin_cpu": {"no-untyped-def", "operator"},
    "megaproof.kernel.host.*": {"attr-defined", "valid-type"},
    "megaproof.kernel.emulator": {"attr-defined", "valid-type"},
    "megaproof.kernel.api": {"assignment", "misc"},
    "megaproof.kernel.baseline.*": {"arg-type"},
    "megaproof.reference.__main__": {"arg-type", "call-arg", "misc"},
    "megaproof.golden.*": {"misc"},
    "megaproof.proof.*": {
        *("arg-type", "assignment", "attr-defined", "call-arg", "index"),
        *("misc", "name-defined", "operator", "union-attr"),
    },
    "megaproof.bench.*": {"arg-type", "attr-defined", "type-var", "union-attr"},
}
"""What mypy does not say of a module, though it could. A code that no module needs leaves both lists; none comes."""


def test_strictness_only_grows() -> None:
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    silenced = {
        module: set(override["disable_error_code"])
        for override in mypy["overrides"]
        if "disable_error_code" in override
        for module in override["module"]
    }
    assert silenced == NOT_STRICT
    assert mypy["strict"] is True
    ours = [name for override in mypy["overrides"] if "follow_imports" in override for name in override["module"]]
    assert not [name for name in ours if name.startswith("megaproof")]


def test_no_module_of_ours_is_ignored() -> None:
    for path in (ROOT / row for row in PRODUCT):
        for file in path.rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"^# mypy: ignore-errors|^# type: ignore", text, re.MULTILINE), file


def test_the_rows_are_laid_out_as_a_wheel_has_them(tmp_path: Path) -> None:
    package = laid_out(tmp_path)
    assert laid_out(tmp_path) == package  # a second run begins anew
    assert {path.name for path in package.iterdir() if path.is_dir()} == set(PRODUCT[1:])
    assert (package / "quant" / "recipe.py").samefile(ROOT / "quant" / "recipe.py")
    assert (package / "moved.py").samefile(ROOT / "megaproof" / "moved.py")


def test_make_asks_mypy_and_clang_format_as_it_asks_ruff() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("test", "lint"):
        found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
        assert found
        assert "$(with_mypy)" in found[1], target
        assert "$(call with_clang_format,--dry-run -Werror)" in found[1], target
    pins = (ROOT / "constraints.txt").read_text()
    assert "\nmypy==" in pins
    assert "\nclang-format==" in pins
