"""`python -m bench report`: what it writes, what it calls stale, and which results it refuses to quote. No GPU."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megaproof.bench.report import page, sections
from megaproof.tests.support import command_line, sample
from megaproof.toolchain.errors import EnvironmentMissing

EMPTY = f"# title\n\n{page.START}\n{page.END}\n\nthe end\n"
WRITTEN = EMPTY.replace(page.START, f"{page.START}\n{sample.PAGE.read_text().rstrip()}")
PICTURE = "bench/results/h200/sweep.svg"
CURRENT = (0, "docs/results.md and its pictures are of bench/results/*/*.json\n")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sample in a folder of its own, and an empty page."""
    sample.use(monkeypatch)
    monkeypatch.setattr(page, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(page.plot, "check", lambda path: None)
    monkeypatch.setattr(page.plot, "plot", lambda result, path: path.write_text(f"<svg>{len(result['rows'])} \n</svg>"))
    page.PAGE.write_text(EMPTY)
    sample.copy(tmp_path / "results" / "h200")
    return tmp_path / "results" / "h200"


report = partial(command_line.bench, "report")


def stale() -> str:
    """What --check names."""
    status, text = report("--check")
    assert status == 1
    return text.partition("json: ")[2].partition(";")[0]


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_the_page_and_its_picture_are_written_once(folder: Path) -> None:
    assert stale() == f"docs/results.md, {PICTURE}"
    assert page.PAGE.read_text() == EMPTY, "--check writes nothing"
    assert report() == (0, f"written: docs/results.md, {PICTURE}\n")
    assert page.PAGE.read_text() == WRITTEN
    assert (folder / "sweep.svg").read_text().startswith("<svg>18\n</svg>\n<!-- rows of sweep.json"), "rows shown alone"
    assert report("--check") == report() == CURRENT


def test_what_is_stale_is_named(folder: Path) -> None:
    report()
    rows = json.loads((folder / "sweep.json").read_text())["rows"]
    change(folder / "sweep.json", rows=[rows[0] | {"us_spread": 9.9}, *rows[1:]])
    assert stale() == PICTURE, "a column that no table has"
    assert report() == (0, f"written: {PICTURE}\n")
    page.PAGE.write_text(page.PAGE.read_text().replace("| 68.2 |", "| 86.2 |"))
    assert stale() == "docs/results.md"
    assert report() == (0, "written: docs/results.md\n")
    assert page.PAGE.read_text() == WRITTEN


def test_nothing_measured_needs_no_picture(folder: Path) -> None:
    for path in folder.glob("*.json"):
        path.unlink()
    assert report() == (0, "written: docs/results.md\n")
    assert page.PAGE.read_text() == EMPTY.replace(page.START, f"{page.START}\n{sections.NOTHING}")
    assert report("--check") == CURRENT


def test_without_matplotlib_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> None:
        raise EnvironmentMissing("--plot needs matplotlib")

    monkeypatch.setattr(page.plot, "check", missing)
    assert report() == (3, "environment: --plot needs matplotlib\n")
    assert page.PAGE.read_text() == EMPTY


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("# title\n", f"docs/results.md must have the marker {page.START} once and has it 0 times"),
        (f"{page.START}\n", f"the marker {page.END} once and has it 0 times"),
        (EMPTY + page.START, f"the marker {page.START} once and has it 2 times"),
        (f"{page.END}\n{page.START}\n", f"the marker {page.END} after {page.START}"),
        (None, "docs/results.md is missing"),
    ],
    ids=["no markers", "one marker", "twice", "in the wrong order", "no page"],
)
@pytest.mark.parametrize("arguments", [(), ("--check",)], ids=["written", "checked"])
def test_a_page_that_cannot_be_written(document: str | None, message: str, arguments: tuple[str, ...]) -> None:
    page.PAGE.unlink() if document is None else page.PAGE.write_text(document)
    status, text = report(*arguments)
    assert status == 1
    assert message in text
    assert document is None or page.PAGE.read_text() == document


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dense", "{", "dense.json is damaged"),
        ("dense", "[]", "dense.json is damaged: a result is an object"),
        ("dense", {"rows": []}, "dense.json is damaged: a result has rows"),
        ("dense", {"rows": [1]}, "dense.json is damaged: row 0: it is no object"),
        ("phases", {"rows": [{"T": 1}]}, "row 0: clock_mhz, preset, roles, routing, us missing"),
        ("other", '{"rows": []}', "other.json is none of sweep.json, distinct.json"),
        ("sweep", '{"rows": [1], "code": {}}', "sweep.json is damaged: date, device, driver, method, regime, versions"),
        ("sweep", {"code": {"moe": {"moe_fast": "0"}}}, "sweep.json is stale: its code of moe_fast of moe is not that"),
        ("sweep", {"code": {"gone": {"k": "0"}}}, "sweep.json is stale: its code of k of gone is not that of"),
        ("sweep", {"code": {}}, "sweep.json is damaged: code names the entries"),
        ("sweep", {"code": {"moe": {}}}, "sweep.json is damaged: code names the entries"),
        ("sweep", {"code": {"moe": "0"}}, "sweep.json is damaged: code names the entries"),
        ("sweep", {"complete": False}, "sweep.json: the run was cut short"),
        ("sweep", {"failed": ["T=1: no"]}, "or a point failed; measure again"),
        ("sweep", 2, "sweep.json has 18 points twice, the first is dsv4_flash T = "),
        ("sweep", "distinct", "sweep.json has no row of folded, l2 flushed, 64"),
        ("distinct", "sweep", None),
        ("distinct", "sustained", "distinct.json has no row of distinct, l2 flushed, 64"),
        ("distinct", {"device": "NVIDIA H20"}, "distinct.json has device 'NVIDIA H20'; it must be sweep.json's, 'NVID"),
        ("distinct", {"driver": "1"}, "distinct.json has driver '1'; it must be sweep.json's, '580.1'"),
        ("sweep", None, "sweep.json is missing beside baseline.json, dense.json, distinct.json"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:60],
)
def test_a_result_that_is_refused(folder: Path, name: str, text: Any, message: str | None) -> None:
    """text: the file's own, keys to replace, the result whose rows it has instead, how often it has its rows, or None:
    the file is not there."""
    path = folder / f"{name}.json"
    if isinstance(text, dict):
        change(path, **text)
    elif isinstance(text, int):
        change(path, rows=text * json.loads(path.read_text())["rows"])
    elif text in ("sweep", "distinct", "sustained"):
        change(path, rows=json.loads((folder / f"{text}.json").read_text())["rows"])
    else:
        path.write_text(text) if text else path.unlink()
    status, output = report()
    assert status == int(message is not None)
    assert (message or "") in output
