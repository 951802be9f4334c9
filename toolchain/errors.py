"""What goes wrong, in one sentence each: an argument that is refused, and all between a source and its launch."""

from __future__ import annotations

import reprlib
from numbers import Number
from typing import Any


class _Short(reprlib.Repr):
    """Numbers, text and what holds them, shortened; of anything else the type alone.

    The `repr` of a tensor waits for its device, and crashes where its memory was let go of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maxstring, self.maxlong = 80, 40

    def repr_instance(self, x: Any, level: int) -> str:
        return repr(x) if x is None or isinstance(x, Number) else f"a {type(x).__name__}"


def shown(value: Any) -> str:
    """A value as an error shows it: one short line of printable characters."""
    try:
        text = _Short().repr(value)
    except Exception:  # an int of more than 4300 digits
        text = f"a {type(value).__name__}"
    return "".join(letter if letter.isprintable() else " " for letter in text)


class ArgumentError(ValueError):
    """An argument that is refused: one line that names the argument, its value and the rule."""


class EnvironmentMissing(RuntimeError):
    """A package, driver or device that is not there; one sentence saying what is needed (exit status 3)."""


class BuildError(RuntimeError):
    """A source that does not compile, or a cubin that does not pass the gate."""


class LaunchError(RuntimeError):
    """A call of the CUDA driver that failed, with its name and code."""


def escaped(text: object, most: int = 200) -> str:
    """A text that others wrote, such as a file's name, for a message: one line, with nothing that a terminal obeys.

    Control characters, line ends, signs that turn the direction of writing, and bytes that are no UTF-8 are written as
    escapes; what is longer than `most` characters is cut.
    """
    text = str(text)
    cut = text if len(text) <= most else f"{text[:most]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
