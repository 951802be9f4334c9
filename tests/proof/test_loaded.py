"""Every module of ours has one name; a user's own module of the same name is no matter of ours (proof/loaded.py)."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from megaproof import HOME
from megaproof.proof import loaded
from megaproof.tests.support.runs import pytest_run, python


def module(name: str, file: Path | str | None) -> ModuleType:
    found = ModuleType(name)
    if file is not None:
        found.__file__ = str(file)
    return found


def problems(command: str = "pytest", **files: Path | str | None) -> list[str]:
    """Names with . as __."""
    names = {name.replace("__", "."): file for name, file in files.items()}
    return loaded.problems({name: module(name, file) for name, file in names.items()}, command.split())


def test_this_session_has_one_name_for_each() -> None:
    assert loaded.problems() == []


def test_a_bare_name_of_ours_is_named() -> None:
    (line,) = problems(kernel__api=HOME / "kernel/api.py")
    assert line == f"{HOME / 'kernel/api.py'} is loaded as kernel.api; its one name is megaproof.kernel.api"


def test_one_file_under_two_names_is_named() -> None:
    file = HOME / "tests/meta/test_house.py"
    (line,) = problems(tests__meta__test_house=file, megaproof__tests__meta__test_house=file)
    assert line == f"{file} is loaded 2 times, as megaproof.tests.meta.test_house and as tests.meta.test_house"
    both = {"quant__scale": HOME / "quant/scale.py", "megaproof__quant__scale": HOME / "quant/scale.py"}
    (line,) = problems(**both)
    assert "its one name is megaproof.quant.scale" in line, "one sentence says which, not two"


def test_a_second_name_of_one_module_is_no_second_module() -> None:
    one = module("megaproof.quant.scale", HOME / "quant/scale.py")
    assert loaded.problems({"megaproof.quant.scale": one, "megaproof.alias": one}, ["pytest"]) == []


@pytest.mark.parametrize("name", loaded.FOLDERS)
def test_a_users_own_module_of_that_name_is_fine(name: str, tmp_path: Path) -> None:
    assert problems(**{name: tmp_path / f"{name}.py"}) == []


def test_what_is_in_an_environment_inside_the_checkout_is_not_ours() -> None:
    packages = HOME / ".venv/lib/python3/site-packages"
    assert problems(kernel=packages / "kernel.py", a=packages / "x.py", b=packages / "x.py", builtin=None) == []


def test_the_bare_package_of_a_command_is_fine() -> None:
    assert problems("python -m kernel build", kernel=HOME / "kernel/__init__.py") == []
    assert problems("python -m golden verify", kernel=HOME / "kernel/__init__.py") != []


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_a_session_with_two_names_fails(tmp_path: Path, workers: list[str]) -> None:
    if workers:
        pytest.importorskip("xdist")
    source = """
        import sys
        from types import ModuleType
        import megaproof.quant.scale

        def test_it():
            twice = ModuleType("quant.scale")
            twice.__file__ = megaproof.quant.scale.__file__
            sys.modules["quant.scale"] = twice
    """
    run = pytest_run(tmp_path, source, *workers)
    assert run.returncode == 1, run.stdout
    assert "1 passed" in run.stdout
    assert "scale.py is loaded as quant.scale; its one name is megaproof.quant.scale" in run.stdout


def test_a_users_golden_py_beside_his_test_is_fine(tmp_path: Path) -> None:
    """In a folder of his own, without the checkout's settings, which put the checkout first."""
    (tmp_path / "golden.py").write_text("VALUE = 3\n")
    (tmp_path / "test_tiny.py").write_text("import golden\n\ndef test_it():\n    assert golden.VALUE == 3\n")
    plugins = ("-p", "megaproof.proof.plugin", "-p", "no:cacheprovider", "--no-header")
    run = python(tmp_path, "-m", "pytest", *plugins, "test_tiny.py")
    assert run.returncode == 0, run.stdout
