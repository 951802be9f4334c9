"""One sample of results, made up so that no two figures are alike: its files, its peers and its expected page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaproof.bench import peers
from megaproof.bench.report import results
from megaproof.tests.support.runs import ROOT

DATA = ROOT / "tests" / "bench" / "data"
FOLDER, PAGE = DATA / "sample", DATA / "sample_page.txt"
PEERS = json.loads((DATA / "sample_peers.json").read_text())


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample's peers are those of an H200, and the code that it names is the pinned one."""
    entries = dict.fromkeys(("moe_fast", "dense_128", "dense_64"), "sample")
    pins = dict.fromkeys(("moe", "moe_g128", "dense", "phases"), entries)
    monkeypatch.setitem(peers.PEERS, "h200", PEERS)
    monkeypatch.setattr(type(results.PINS), "code", lambda self: pins)


def copy(folder: Path, **keys: object) -> None:
    """The sample's files, with these keys of each replaced."""
    folder.mkdir(parents=True)
    for path in FOLDER.glob("*.json"):
        (folder / path.name).write_text(json.dumps(json.loads(path.read_text()) | keys))
