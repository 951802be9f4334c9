"""The commands that README, CONTRIBUTING and docs/ show exist: targets of make, modules, options, files, case ids."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from megaproof.cases.cases import CASES
from megaproof.tests.support.runs import ROOT

OLD = ROOT / "docs" / "migration.md"
"""It shows what is not there any more."""
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md")) if page != OLD),
)
COMMAND = re.compile(r"^(?:python3?|make|pytest) ")
OPTIONAL = re.compile(r"\[([^\[\]]*)\]")


def commands(document: Path) -> Iterator[str]:
    """Every command of its code blocks and of its inline code, without comments, alternatives in [] taken."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    for line in lines:
        line = OPTIONAL.sub(r"\1", line.split("  #")[0].split(" # ")[0].strip())
        if COMMAND.match(line):
            yield from (part.strip() for part in line.split("&&"))


ALL = sorted({(name, command) for name in DOCUMENTS for command in commands(ROOT / name)})


def problem(command: str, parser: pytest.Parser) -> str | None:
    """What of a command does not exist."""
    words = shlex.split(command)
    if words[0] == "make":
        return _make(words[1:], parser)
    arguments = words[1:] if words[0] == "pytest" else words[3:]
    if words[0] != "pytest" and words[1:2] != ["-m"]:
        return "neither a module nor a test run"
    module = "pytest" if words[0] == "pytest" else words[2]
    return _pytest(arguments, parser) if module == "pytest" else _module(module, arguments)


def _make(words: list[str], parser: pytest.Parser) -> str | None:
    makefile = (ROOT / "Makefile").read_text()
    for word in (word for word in words if word != "..."):
        name, is_variable, value = word.partition("=")
        if not re.search(rf"^{name}{' [?:]?=' if is_variable else ':'}", makefile, re.MULTILINE):
            return f"the Makefile has no {name}"
        if name == "PYTEST_ARGS" and (wrong := _pytest(shlex.split(value), parser)):
            return wrong
    return None


def _pytest(words: list[str], parser: pytest.Parser) -> str | None:
    known = {name: action for action in parser.optparser._actions for name in action.option_strings}
    words = [word for word in words if word != "..."]
    while words:
        word = words.pop(0)
        name, joined, _ = word.partition("=")
        if name == "-n":  # pytest-xdist's, which need not be installed
            words[:1] = []
        elif word.startswith("-"):
            if name not in known:
                return f"pytest has no option {name}"
            takes = known[name].nargs != 0 and not joined
            value = words.pop(0) if takes and words else None
            if name == "-k" and value and not _selects(value):
                return f"-k {value} selects no case and no test"
        elif not (ROOT / _file(word)).exists():
            return f"{word} does not exist"
    return None


def _file(word: str) -> str:
    """What a word of pytest's names: a file or folder, or (with --pyargs) a module of ours."""
    module = word.removeprefix("megaproof.")
    return f"{module.replace('.', '/')}.py" if module != word else word.split("::")[0]


def _selects(expression: str) -> bool:
    """Whether each word of a -k stands in a case id or in the name of a test, its class or its file."""
    words = [word for word in re.findall(r"[\w.-]+", expression) if word not in ("and", "or", "not", "name")]
    names = {case.id for case in CASES}
    for path in (ROOT / "tests").rglob("test_*.py"):
        names |= {path.name, *re.findall(r"(?:def|class) ([Tt]est\w+)", path.read_text(encoding="utf-8"))}
    return all(any(word in name for name in names) for word in words)


def _module(module: str, arguments: list[str]) -> str | None:
    ours = module.removeprefix("megaproof.")
    path = ROOT / ours.replace(".", "/")
    if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
        return f"there is no module {module}"
    found = importlib.import_module(f"megaproof.{ours}.__main__" if path.is_dir() else f"megaproof.{ours}")
    app = getattr(found, "app", None)
    source = Path(str(found.__file__)).read_text(encoding="utf-8")
    if app is None:
        return next((f"{module} does not know {word}" for word in arguments if word not in source), None)
    command = typer.main.get_command(app)
    subcommands = getattr(command, "commands", None)
    # 'verify | regenerate | capture' names several.
    names = [word for word in arguments if subcommands and re.fullmatch(r"[a-z]+", word)]
    if subcommands and arguments and "|" in arguments:
        return next((f"{module} has no command {name}" for name in names if name not in subcommands), None)
    if subcommands and names:
        if names[0] not in subcommands:
            return f"{module} has no command {names[0]}"
        command = subcommands[names[0]]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    options |= {"--help"}
    used = {word.partition("=")[0] for word in arguments if word.startswith("-")}
    return f"python -m {module} has no {', '.join(sorted(used - options))}" if used - options else None


@pytest.fixture(scope="module")
def parser(pytestconfig: pytest.Config) -> pytest.Parser:
    return pytestconfig._parser


@pytest.mark.parametrize(("document", "command"), ALL, ids=[f"{name}: {command}" for name, command in ALL])
def test_a_command_that_is_shown_exists(document: str, command: str, parser: pytest.Parser) -> None:
    wrong = problem(command, parser)
    assert wrong is None, f"{document} shows `{command}`: {wrong}"


def test_the_documents_show_commands() -> None:
    """So that a change of style does not leave the check without anything to check."""
    shown = {name: [command for document, command in ALL if document == name] for name in DOCUMENTS}
    assert len(shown["README.md"]) >= 5, shown["README.md"]
    assert len(shown["CONTRIBUTING.md"]) >= 20, shown["CONTRIBUTING.md"]
    assert len(ALL) >= 60, shown


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("make gat", "no gat"),
        ("make gate PYTEST_AGRS=-x", "no PYTEST_AGRS"),
        ("make gate PYTEST_ARGS='--require-gpus'", "no option --require-gpus"),
        ("pytest --rank 8", "no option --rank"),
        ("python -m pytest -k dsv5_flash", "selects no case"),
        ("python -m pytest tests/test_none.py", "does not exist"),
        ("python -m goldens verify", "no module goldens"),
        ("python -m golden verified", "no command verified"),
        ("python -m golden verify --onyl x", "has no --onyl"),
        ("python -m golden verify | generate", "no command generate"),
        ("python -m proof wrong --yaml", "has no --yaml"),
        ("python -m tests.third.figures --yaml", "does not know --yaml"),
    ],
)
def test_a_command_that_is_wrong_is_found(command: str, message: str, parser: pytest.Parser) -> None:
    assert message in (problem(command, parser) or "")
