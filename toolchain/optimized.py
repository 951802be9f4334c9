"""Interpreters that leave out asserts (`python -O`, PYTHONOPTIMIZE) may compute, and may not prove.

The product raises; tests and other people's adapters assert. A proof in which asserts are left out could be green
because nothing was looked at.
"""

from __future__ import annotations

import sys

EXIT_ENVIRONMENT = 3
"""Exit status of a run or command that this environment can't begin."""


def why_not() -> str | None:
    """The sentence that refuses to prove anything in this interpreter, or None where asserts are kept."""
    if not sys.flags.optimize:
        return None
    return (
        f"this Python leaves out asserts (-O or PYTHONOPTIMIZE, level {sys.flags.optimize}), so that a proof could be "
        "green with nothing checked: run it without"
    )


def refuse() -> None:
    """Ends a proving command with status 3 and one sentence where asserts are left out. Raises SystemExit."""
    if reason := why_not():
        print(reason, file=sys.stderr)
        raise SystemExit(EXIT_ENVIRONMENT)
