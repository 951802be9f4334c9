"""What a run leaves behind and shows: every view is made from its record, `run.json`. See `proof/record.py`."""

from __future__ import annotations

import os
from pathlib import Path

import megaproof
from megaproof import HOME


def folder() -> Path:
    """Where records and bundles go: `reports` of the checkout that the current folder is in, else of that folder.

    An installed package is no place to write to, and neither is a checkout that somebody else owns.
    """
    here, in_checkout = Path.cwd(), Path(megaproof.__file__).resolve().parent != HOME
    if in_checkout and here.is_relative_to(HOME) and os.access(HOME, os.W_OK):
        return HOME / "reports"
    return here / "reports"
