"""Commands of the project as a shell would call them, in one process."""

from __future__ import annotations

import typer
from typer.testing import CliRunner

PLAIN = {"COLUMNS": "240", "NO_COLOR": "1", "TERM": "dumb"}
"""Wide and without colour, so that an option's name is in one piece."""


def invoke(app: typer.Typer, *arguments: str) -> tuple[int, str]:
    """(exit status, all output)."""
    result = CliRunner().invoke(app, arguments, env=PLAIN)
    return result.exit_code, result.output


def bench(command: str, *arguments: str) -> tuple[int, str]:
    """(exit status, all output) of `python -m bench command ...`."""
    from megaproof.bench.__main__ import app

    return invoke(app, command, *arguments)


def assert_usage(status_and_text: tuple[int, str], message: str) -> None:
    """The command ended as usage errors do, and said this."""
    status, text = status_and_text
    if status != 2 or message not in " ".join(text.replace("│", " ").split()):
        raise AssertionError(f"status {status} instead of 2, or no {message!r} in:\n{text}")
