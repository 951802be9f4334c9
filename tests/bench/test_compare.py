"""Two results of the benchmark side by side, the regression gate's exit status, and the picture. No GPU."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaproof.bench import command
from megaproof.bench.measure.points import UsageError
from megaproof.bench.report import compare, plot
from megaproof.tests.support import command_line
from megaproof.toolchain.errors import EnvironmentMissing

POINT = {"preset": "dsv4_flash", "T": 8, "routing": "folded"}
"""As results were before they had regimes."""
FLUSHED = POINT | {"regime": "l2 flushed", "clamp": 10.0, "silu": "fast", "granularity": 64}
SHOWN = FLUSHED | {"us": 104.0, "share_floor": 0.8, "share_read": 0.7, "share_compute": 0.2, "pr323": 178.6}


invoke = partial(command_line.bench, "sweep")


def result(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text(json.dumps({"rows": rows}))
    return str(path)


def test_by_point() -> None:
    new, old = [POINT | {"us": 104.0}, POINT | {"T": 9, "us": 1.0}], [POINT | {"us": 100.0}]
    both = compare.pairs(new, old)
    assert [(pair.new, pair.old) for pair in both] == [(104.0, 100.0)]
    assert compare.slower(both, 5) == []
    assert [str(pair) for pair in compare.slower(both, 3)] == ["dsv4_flash T=8 folded: 104.0 us, was 100.0 (+4.0 %)"]
    assert compare.report(both, 3)[-1] == "1 points compared, 1 slower"


def test_an_older_result_is_of_the_defaults() -> None:
    old = [POINT | {"us": 100.0}]
    assert len(compare.pairs([FLUSHED | {"us": 1.0}], old)) == 1
    for other in ({"regime": "sustained"}, {"clamp": None}, {"clamp": 1.0}, {"silu": "precise"}, {"granularity": 128}):
        assert compare.pairs([FLUSHED | other | {"us": 1.0}], old) == []


def test_a_point_names_what_is_not_the_default() -> None:
    row = FLUSHED | {"regime": "sustained", "clamp": None, "silu": "precise", "us": 3.0}
    (pair,) = compare.pairs([row], [row])
    assert str(pair) == "dsv4_flash T=8 folded sustained no clamp precise: 3.0 us, was 3.0 (+0.0 %)"
    row = FLUSHED | {"granularity": 128, "us": 3.0}
    (pair,) = compare.pairs([row], [row])
    assert str(pair) == "dsv4_flash T=8 folded granularity 128: 3.0 us, was 3.0 (+0.0 %)"


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=20), st.floats(0, 100))
def test_a_result_is_never_slower_than_itself(times: list[float], percent: float) -> None:
    rows = [POINT | {"T": t + 1, "us": us} for t, us in enumerate(times)]
    both = compare.pairs(rows, rows)
    assert len(both) == len(rows)
    assert compare.verdict(both, percent) == 0
    doubled = compare.pairs([row | {"us": 2.5 * row["us"]} for row in rows], rows)
    assert compare.verdict(doubled, percent) == 1
    assert compare.verdict(doubled, None) == 0


def test_nothing_in_common_is_not_a_pass() -> None:
    assert compare.verdict(compare.pairs([POINT | {"us": 1.0}], [POINT | {"T": 1, "us": 1.0}]), None) == 5


def test_two_files_need_no_gpu(tmp_path: Path) -> None:
    old = result(tmp_path / "old.json", POINT | {"us": 100.0})
    new = result(tmp_path / "new.json", FLUSHED | {"us": 104.0})
    other = result(tmp_path / "other.json", POINT | {"T": 1, "us": 1.0})
    status, text = invoke("--compare", old, new)
    assert status == 0
    assert "dsv4_flash T=8 folded: 104.0 us, was 100.0 (+4.0 %)" in text
    assert invoke("--compare", old, new, "--fail-slower", "5")[0] == 0
    assert invoke("--compare", old, new, "--fail-slower", "3")[0] == 1
    assert invoke("--compare", new, old, "--fail-slower", "0")[0] == 0
    assert invoke("--compare", old, other)[0] == 5


def test_a_run_is_compared_with_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "measure", lambda options, trace, keep: {"rows": [SHOWN]})
    old, written = result(tmp_path / "old.json", POINT | {"us": 100.0}), tmp_path / "new.json"
    assert invoke("--compare", old, "--fail-slower", "3", "--json", str(written))[0] == 1
    assert json.loads(written.read_text())["rows"] == [SHOWN], "a run that fails the gate is written all the same"
    assert invoke("--compare", old, "--fail-slower", "5")[0] == 0


def test_wrong_bits_fail_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "measure", lambda options, trace, keep: {"rows": [SHOWN | {"differing": 3}]})
    status, text = invoke("--check-output-diff")
    assert status == 1
    assert "dsv4_flash T=8 folded l2 flushed: 3 elements of y are not the exact baseline's" in text


def test_a_run_that_was_cut_short(tmp_path: Path) -> None:
    """It is compared, and said to be short; a gate takes whole results alone. Older ones say nothing and are whole."""
    whole, short = tmp_path / "whole.json", tmp_path / "short.json"
    for path, complete in ((whole, True), (short, False)):
        path.write_text(json.dumps({"complete": complete, "rows": [POINT | {"us": 100.0}]}))
    for pair in ((whole, short), (short, whole)):
        status, text = invoke("--compare", *map(str, pair))
        assert status == 0
        assert f"{short}: the run was cut short, 1 points" in text
        status, text = invoke("--compare", *map(str, pair), "--fail-slower", "5")
        assert status == 2
        assert "--fail-slower needs whole results" in text
    old = result(tmp_path / "old.json", POINT | {"us": 100.0})
    assert "cut short" not in invoke("--compare", old, str(whole), "--fail-slower", "5")[1]


@pytest.mark.parametrize("text", ['{"rows": [{}]}', "{", "[]", '{"rows": [{"us": "1"}]}', '{"rows": {"a": 1}}'])
def test_what_is_no_result_is_usage(text: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"--compare .*old\.json must be a result of this command"):
        compare.read_rows(path)
    assert invoke("--compare", str(path))[0] == 2


def test_lines_of_the_picture() -> None:
    sustained = SHOWN | {"regime": "sustained", "us": 120.0, "pr323": None, "share_read": None, "share_compute": None}
    times, shares = plot.lines([SHOWN | {"T": 16}, SHOWN, sustained, SHOWN | {"preset": "glm"}], "dsv4_flash")
    assert times == {
        "fused, folded, l2 flushed": [(8, 104.0), (16, 104.0)],
        "fused, folded, sustained": [(8, 120.0)],
        "pr323": [(8, 178.6), (16, 178.6)],
    }
    assert shares["fused, folded, l2 flushed, measured"] == [(8, 0.7), (16, 0.7)]
    assert shares["pr323"] == [(8, 0.8 * 104 / 178.6), (16, 0.8 * 104 / 178.6)]
    assert shares["fused, folded, sustained"] == [(8, 0.8)]


def test_without_matplotlib_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EnvironmentMissing, match=r"--plot needs matplotlib .*install it"):
        plot.check(tmp_path / "a.png")
    assert invoke("--plot", str(tmp_path / "a.png"))[0] == 3


@pytest.mark.parametrize("suffix", plot.SUFFIXES)
def test_a_picture(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; --plot alone needs it")
    path = tmp_path / f"sweep{suffix}"
    old = result(tmp_path / "old.json", SHOWN, SHOWN | {"T": 16}, SHOWN | {"preset": "glm"})
    status, text = invoke("--compare", old, old, "--plot", str(path))
    assert status == 0, text
    assert path.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
