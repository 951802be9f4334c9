"""The part of the page on another run of the public kernels, in turn with ours on another card (`second_run`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OURS, OURS_128, BESIDE = "ours_64", "ours_128", {"flashinfer_mxfp4_0_7_4": "ours_64_beside_flashinfer"}
"""Our columns: those that peers are compared with, and of a peer that ran at another time the one beside it."""
WORDS = """\
Another run of public kernels, of {date}. {what} Other lines are our time, scales per 64, over theirs: below 1 ours is
faster. {note} What each name is stands in bench/peers/{folder}.json."""


def words(again: Mapping[str, Any], folder: str) -> str:
    """What stands before the tables."""
    return WORDS.format(date=again["date"], what=again["what"], note=again["note"], folder=folder)


def tables(again: Mapping[str, Any]) -> dict[str, tuple[list[str], list[tuple[str, list[float | None]]]]]:
    """Preset -> (T, lines): our times in us, then our time over that of each peer; None where there is none."""
    found = {}
    for preset, us in again["us"].items():
        tokens = list(us[OURS])
        lines: list[tuple[str, list[float | None]]] = [
            (f"{name}, us", [us[name].get(t) for t in tokens]) for name in (OURS, OURS_128)
        ]
        for name in (name for name in us if not name.startswith("ours")):
            own = us[BESIDE.get(name, OURS)]
            lines.append((f"over {name}", [own[t] / us[name][t] if t in us[name] else None for t in tokens]))
        found[preset] = (tokens, lines)
    return found
