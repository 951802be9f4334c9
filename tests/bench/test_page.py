"""The page of results: one sample and its expected page as a whole, and a second opinion on every figure. No GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megaproof.bench import peers
from megaproof.bench.measure import phases
from megaproof.bench.model import chips
from megaproof.bench.report import page, results, sections
from megaproof.tests.support import results_again as again
from megaproof.tests.support import sample, targets_again


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The sample as the report reads it."""
    sample.use(monkeypatch)
    return results.read(sample.FOLDER)


def agrees(markdown: str, found: dict[str, dict[str, Any]], theirs: dict[str, Any]) -> None:
    """The page's tables, cell by cell, and its sentences are those of the second opinion."""
    shown, wanted = again.shown(markdown), again.tables(found, theirs) | targets_again.table(found, theirs)
    assert list(shown) == list(wanted)
    for head, lines in wanted.items():
        assert shown[head] == lines
        assert list(shown[head]) == list(lines), "in this order"
    flat = " ".join(markdown.split())
    assert [words for words in again.sentences(found, theirs) if words not in flat] == []


def test_the_sample_is_the_expected_page(read: dict[str, dict[str, Any]]) -> None:
    assert sections.render(read) + "\n" == sample.PAGE.read_text()


def test_the_expected_page_says_what_follows_from_the_sample() -> None:
    agrees(sample.PAGE.read_text(), again.load(sample.FOLDER), sample.PEERS)


def test_the_committed_page_says_what_follows_from_the_results() -> None:
    found = again.load(page.RESULTS / "h200")
    if not found:
        pytest.skip("none of the results is of this code")
    _, between, _ = page.section(page.PAGE.read_text())
    agrees(between, found, peers.PEERS["h200"])


@pytest.mark.parametrize("name", [name for name in results.COLUMNS if name != "sweep"])
def test_a_result_that_is_missing_leaves_its_parts_out(name: str, read: dict[str, dict[str, Any]]) -> None:
    """And nothing else changes; its targets are not measured."""
    del read[name]
    found = again.load(sample.FOLDER)
    del found[name]
    markdown = sections.render(read)
    agrees(markdown, found, sample.PEERS)
    heads = {"dense": sections.DENSE, "phases": sections.PHASES, "baseline": "The unfused baseline (kernel"}
    heads |= {"granularity_128": "Time with scales", "distinct": sections.NO_YARDSTICKS}
    absent = [other for other, head in heads.items() if head[:35].strip() not in " ".join(markdown.split())]
    assert absent == [name for name in heads if name not in read]


@pytest.mark.parametrize(
    "factors",
    [{}, {256: 0.5}, {1: 0.992, 128: 1.005}, {128: 1.005, 512: 1.01, 1024: 1.02}, {512: 0.94}, {2: 0.5, 512: 1.0}],
    ids=["no pair", "between", "both ways", "more", "one", "the same"],
)
def test_granularity_in_words(factors: dict[int, float], read: dict[str, dict[str, Any]]) -> None:
    """Scales per 128 take so many times as long, at T of which T = 128 up to 512 are in neither group."""
    usual = {row["T"]: row["us"] for row in again.kept(again.load(sample.FOLDER), "sweep") if row["T"] < 8192}
    (like,) = [row for row in read["granularity_128"]["rows"] if row["T"] == 1]
    read["granularity_128"]["rows"] = [like | {"T": t, "us": usual[t] * f} for t, f in factors.items()]
    flat = " ".join(sections.render(read).split())
    words = again.sentences({name: dict(own) for name, own in read.items()}, sample.PEERS)
    said = [sentence for sentence in words if sentence.endswith(("less", "more"))]
    assert ("Time with scales" in flat) == bool(said)
    assert not said or f"(dsv4_flash): {', '.join(said)}." in flat


@pytest.mark.parametrize("rate, word", [(1.0, False), (0.99, True)], ids=["as fast", "slower"])
def test_what_the_yardstick_is_worth(rate: float, word: bool, read: dict[str, dict[str, Any]]) -> None:
    """It is said to be below the ceiling where no dense rate reaches the plain kernel's."""
    plain = sample.PEERS["dense"]["tflops"]
    for row in read["dense"]["rows"]:
        size = f"{row['m']} x {row['n']} x {row['k']}"
        row["tflops"] = rate * plain[f"plain_{row['group']}"].get(size, 1)
    assert (sections.BELOW[:60] in " ".join(sections.render(read).split())) is word


def test_nothing_measured() -> None:
    assert sections.render_all({}) == sections.NOTHING


def test_another_chip_has_a_part_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A row of CHIPS and a folder of results: no peers, no stretch, which is the H200's alone, and no model of it."""
    sample.use(monkeypatch)
    monkeypatch.setitem(chips.CHIPS, "X1", dataclasses.replace(chips.H200, name="X1"))
    for folder, device in (("h200", "NVIDIA H200"), ("x1", "NVIDIA X1")):
        sample.copy(tmp_path / folder, device=device)
    markdown = sections.render_all(results.read_all(tmp_path))
    first, _, second = markdown.partition("\n\n## X1\n\n")
    assert first == "## H200\n\n" + sample.PAGE.read_text().rstrip()
    assert "results/x1/sweep.svg" in second
    assert not any(words in second for words in ("h200", "stretch", "PR 323", "DeepGEMM's dense kernel", "X1 by model"))
    assert "not measured" in again.shown(second)["target"]["main loop alone, per 64: at least the plain kernel's"]


def test_an_unmeasured_chip_is_modelled_under_every_preset(
    monkeypatch: pytest.MonkeyPatch, read: dict[str, dict[str, Any]]
) -> None:
    monkeypatch.setitem(chips.CHIPS, "X2", dataclasses.replace(chips.CHIPS["H20"], name="X2"))
    for head, lines in again.shown(sections.render(read)).items():
        if head in ("dsv4_flash, T", "dsv4_pro, T", "glm, T"):
            assert lines["X2 by model, not measured: floor, us"] == lines["H20 by model, not measured: floor, us"]


def test_results_of_another_chips_folder_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sample.use(monkeypatch)
    sample.copy(tmp_path / "h20")
    with pytest.raises(results.ReportError, match=r"h20/sweep\.json has device 'NVIDIA H200': that is no H20"):
        results.read_all(tmp_path)
    (tmp_path / "h20").rename(tmp_path / "b200")
    with pytest.raises(results.ReportError, match="b200 is no chip of"):
        results.read_all(tmp_path)


def test_phases_are_named_as_in_the_kernel() -> None:
    assert [name for name in phases.NAMES if name != "load"] == list(sections.PHASE_LINES)
    assert set(sections.KEEPERS) <= set(phases.ROLES)
