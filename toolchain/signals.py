"""SIGTERM ends a process of ours as an interrupt does: what it has open is tidied up on the way out."""

from __future__ import annotations

import signal
import threading
from typing import NoReturn

EXIT_TERMINATED = 128 + signal.SIGTERM
"""The status that a shell gives to what SIGTERM has ended."""


def exit_on_sigterm() -> None:
    """From now on SIGTERM raises SystemExit(EXIT_TERMINATED) in the main thread; a second one ends the process at once.

    Nothing changes in another thread, or where somebody else has said what SIGTERM does.
    """
    if may_handle_sigterm():
        signal.signal(signal.SIGTERM, _exit)


def may_handle_sigterm() -> bool:
    """Whether nobody else has said what SIGTERM does, and this thread can."""
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def _exit(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(EXIT_TERMINATED)
