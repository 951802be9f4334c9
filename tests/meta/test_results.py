"""Measured results belong to the code they were measured on, and to the pages that quote them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from megaproof.bench.measure.points import PEERS
from megaproof.bench.measure.rows import COLUMNS, Point, row
from megaproof.bench.measure.timer import REGIMES
from megaproof.bench.measure.yardsticks import DENSE, READ
from megaproof.bench.model.roofline import Load
from megaproof.bench.report import page, results, sections
from megaproof.kernel.programs import PINS
from megaproof.kernel.programs.moe import ENTRIES
from megaproof.quant.shapes import SHAPES
from megaproof.tests.support.runs import ROOT

LAST_DIGIT = {"tflops": 0.1, "tflops_adjusted": 0.1, "hbm_gb_s": 1, "reduction_us": 0.02}
"""Of what follows from a time that is rounded itself; of shares and ratios 0.001."""
GIVEN = {"us_spread", "clock_mhz", "power_w"}
"""What does not follow from the other columns."""
FOR_128 = "granularity_128"


def test_the_results_are_whole_and_of_this_code() -> None:
    """`read` refuses all others."""
    results.read(page.RESULTS)


@pytest.mark.parametrize("name", results.POINTS)
def test_what_is_derived_follows_from_the_times(name: str) -> None:
    """Rates, shares and ratios stand in a result beside the times, and what they follow from is no kernel source."""
    regimes = {text: key for key, text in REGIMES.items()}
    found = results.read(page.RESULTS).get(name, {"rows": []})["rows"]
    for own in found:
        shape = SHAPES[own["preset"]]
        load = Load(shape.hidden, shape.intermediate, own["T"], own["rows"], own["touched"], own["granularity"])
        point = Point(own["preset"], own["routing"], regimes[own["regime"]], load, own["clamp"], own["silu"])
        times = {"fused": own["us"], **{each: own[f"{each}_us"] for each in (READ, *DENSE.values())}}
        unfused = own["baseline_us"]
        baseline = None if unfused is None else [unfused, unfused]
        differing = None if unfused is None else 0  # y was compared beside it, and is the same
        again = row(point, {each: [us, us] for each, us in times.items() if us is not None}, baseline, differing)
        for column in COLUMNS.keys() - GIVEN:
            value, wanted = own[column], again[column]
            if isinstance(wanted, int | float):
                wanted = pytest.approx(wanted, abs=1.01 * LAST_DIGIT.get(column, 0.001), rel=0)
            assert value == wanted, (own["preset"], own["T"], column)


def test_the_sweep_has_every_column_of_the_tables() -> None:
    found = results.read(page.RESULTS)
    if found:
        points = {(own["preset"], own["T"]) for own in results.chosen(found, "sweep")}
        assert {(preset, tokens) for preset in PEERS["shapes"] for tokens in sections.TOKENS} <= points


@pytest.mark.parametrize("name", results.COLUMNS)
def test_a_result_names_the_code_that_it_measured(name: str) -> None:
    """Exactly: what is left out can change unseen, and what was not launched must not make a result stale."""
    found = results.read(page.RESULTS).get(name)
    if found is None:
        pytest.skip(f"{name}.json: not measured with this code")
    wanted: dict[str, set[str]] = {}
    for own in found["rows"]:
        if name == "dense":
            wanted.setdefault("dense", set()).add(f"dense_{own['group']}")
        elif name == "phases":
            wanted["phases"] = {"moe_fast"}
        else:
            fused = {64: "moe", 128: "moe_g128"}[own["granularity"]]
            wanted.setdefault(fused, set()).add(f"moe_{own['silu']}")
            beside = {column: own[f"{column}_us"] is not None for column in (READ, *DENSE.values())}
            if beside.pop(READ):
                wanted["stream"] = {"stream_read"}
            for entry in (entry for entry, ran in beside.items() if ran):
                wanted.setdefault("dense", set()).add(entry)
    assert {target: set(own) for target, own in found["code"].items()} == wanted


def test_runs_that_are_reported_are_of_this_code() -> None:
    """Beside times it reports what passed on a GPU, with the digests' first digits: run again, or take it out."""
    proven = " ".join((ROOT / "docs" / "proven.md").read_text().split())
    code = [PINS.code()[target][entry][:12] for target in ("moe", "moe_g128") for entry in ENTRIES]
    quoted = [re.findall(r"`([0-9a-f]{12})`", text) for text in re.findall(r"with code ([^:|]+):", proven)]
    assert all(digits == code for digits in quoted)
    if "| the gate, scales per 64 and per 128: `pytest" in proven:
        assert quoted


def test_the_page_quotes_the_results() -> None:
    found = results.read(page.RESULTS)
    before, between, after = page.section(page.PAGE.read_text())
    assert between == page.render(found), "python -m bench report"
    assert page.drawn(found, page.RESULTS / page.PICTURE), "python -m bench report"
    if not found:  # none is of this code
        assert "No time of the kernel is quoted here" in between
        assert "TFLOP/s" not in before + after


def raw(name: str) -> list[dict[str, Any]]:
    """The rows of a result as they stand in the file; a test that asks for one that is not there has nothing to do."""
    path = page.RESULTS / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path.name}: not measured with this code")
    return json.loads(path.read_text())["rows"]


def by_point(name: str) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["preset"], row["T"]): row for row in raw(name)}


def shown(head: str) -> list[dict[str, str]]:
    """The lines of the page's one table of results whose head begins so: cells by the words of the head."""
    _, between, _ = page.section(page.PAGE.read_text())
    (table,) = (part.splitlines() for part in between.split("\n\n") if part.startswith(f"| {head}"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]


def figures(head: str, name: str) -> dict[int, float]:
    """T -> figure of a line of a table."""
    (line,) = (line for line in shown(f"{head}, T") if next(iter(line.values())) == name)
    return {int(tokens): number(cell) for tokens, cell in list(line.items())[1:] if cell}


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


@pytest.mark.parametrize(
    "line, name", [("of the grouped GEMMs alone", "sweep"), ("scales per 128, of the grouped GEMMs alone", FOR_128)]
)
@pytest.mark.parametrize("preset", PEERS["shapes"])
def test_the_grouped_gemms_in_the_page(preset: str, line: str, name: str) -> None:
    ours, alone = by_point(name), PEERS["us"][preset]["grouped_gemms"]
    wanted = {int(t): ours[preset, int(t)]["us"] / us for t, us in alone.items() if (preset, int(t)) in ours}
    if not wanted:
        assert line not in [next(iter(own.values())) for own in shown(f"{preset}, T")]
        return
    assert figures(preset, line) == pytest.approx(wanted, abs=0.0051)


def test_the_dense_ratios_in_the_page() -> None:
    own = {(f"{row['m']} x {row['n']} x {row['k']}", row["group"]): row for row in raw("dense")}
    others = PEERS["dense"]["tflops"]
    lines = {line["M x N x K"]: line for line in shown("M x N x K")}
    assert lines.keys() == {size for size, _ in own}
    for size, line in lines.items():
        per_128, per_64 = own[size, 128], own[size, 64]
        wanted = {
            "per 128": per_128["tflops"],
            "per 64": per_64["tflops"],
            "cuBLASLt": per_128["cublaslt_tflops"],
            "over cuBLASLt": per_128["tflops"] / per_128["cublaslt_tflops"],
        }
        for column, ours, name in (
            ("per 128 over DeepGEMM", per_128, "deepgemm"),
            ("over plain", per_128, "plain_128"),
            ("per 64 over plain", per_64, "plain_64"),
        ):
            wanted |= {column: ours["tflops"] / others[name][size]} if size in others[name] else {}
        found = {column: number(cell) for column, cell in line.items() if cell and column != "M x N x K"}
        assert found == pytest.approx(wanted, abs=0.0051), size


def test_the_phases_in_the_page() -> None:
    """Of math warpgroup 0, whose phases add up to an SM's time; operands of the producer."""
    rows = raw("phases")
    assert [row["T"] for row in rows] == [1, 8, 128, 1024, 8192]
    assert {(row["preset"], row["routing"]) for row in rows} == {("dsv4_flash", "folded")}
    head = "dsv4_flash, folded"
    names = ["prologue", "wait", "operands", "l1", "l1 epilogue", "l2", "l2 epilogue", "meet", "combine"]
    lines = [next(iter(line.values())) for line in shown(head)]
    assert lines == [*names, "the launch, by events", "SM clock, MHz"]
    for name in names:
        role = "producer" if name == "operands" else "math 0"
        wanted = {row["T"]: row["roles"][role][name]["mean"] for row in rows}
        assert figures(head, name) == pytest.approx(wanted, abs=0.51), name
        small = {tokens: us for tokens, us in wanted.items() if us < 99}
        assert {tokens: figures(head, name)[tokens] for tokens in small} == pytest.approx(small, abs=0.051), name
    assert figures(head, "the launch, by events") == pytest.approx({row["T"]: row["us"] for row in rows}, abs=0.51)
    assert figures(head, "SM clock, MHz") == pytest.approx({row["T"]: row["clock_mhz"] for row in rows}, abs=0.51)
    for own in rows:
        assert 0.9 * own["us"] < sum(phase["mean"] for phase in own["roles"]["math 0"].values()) <= own["us"]


def targets() -> dict[str, tuple[str, str, str]]:
    """Text of a target -> met at, missed at, not measured at."""
    return {text: tuple(rest) for text, *rest in (line.values() for line in shown("target"))}


def test_the_stretch_in_the_page() -> None:
    """Limits and ceilings are written again here, as the work item has them."""
    ours, found = by_point("sweep"), targets()
    missed = {}
    for preset, most, ceiling in (("dsv4_flash", 2200, 1275), ("dsv4_pro", 5300, 1320)):
        own = ours[preset, 8192]
        met = own["us"] <= most
        text = f"stretch, {preset}, T = 8192: at most {most:,} us"
        assert found[text] == (f"{met:d} of 1 points", "" if met else f"{preset} T = 8192: {own['us']:,.0f}", "")
        if own["tflops"] < 0.88 * ceiling:
            missed[preset] = f"{preset} T = 8192: {own['tflops'] / ceiling:.3f}"
    text = "stretch, of the flushed ceiling (bench/model/roofline.py), T = 8192: at least 0.88"
    assert found[text] == (f"{2 - len(missed)} of 2 points", "; ".join(missed.values()), "")


def test_every_miss_in_the_page_has_its_ratio() -> None:
    """Of the target that the most points miss: each T and value, from the file."""
    ours, found = by_point("sweep"), targets()
    met, missed, unmeasured = found["of the plain read, T = 8 to 128: at least 0.92"]
    spoken = {place: row["share_read"] for place, row in ours.items() if 8 <= place[1] <= 128}
    wanted = {place: share for place, share in spoken.items() if share < 0.92}
    assert (met, unmeasured) == (f"{len(spoken) - len(wanted)} of {len(spoken)} points", "")
    said = {}
    for part in filter(None, missed.split("; ")):
        preset, values = part.split(" T = ")
        said |= {(preset, int(t)): float(v) for t, v in (value.split(": ") for value in values.split(", "))}
    assert said == wanted


def test_the_main_loops_targets_in_the_page() -> None:
    own = {(f"{row['m']} x {row['n']} x {row['k']}", row["group"]): row for row in raw("dense")}
    others, found = PEERS["dense"]["tflops"], targets()
    sizes = list(dict.fromkeys(size for size, _ in own))
    met = [
        size
        for size in sizes
        if own[size, 128]["tflops"] >= 0.95 * others["deepgemm"].get(size, float("inf"))
        or own[size, 128]["tflops"] >= 0.98 * own[size, 128]["cublaslt_tflops"]
    ]
    said, missed, unmeasured = found["main loop alone, per 128: at least 0.95 of DeepGEMM's or 0.98 of cuBLASLt's"]
    assert said == f"{len(met)} of {len(sizes)} points"
    assert [part.partition(":")[0] for part in missed.split("; ") if part] == [s for s in sizes if s not in met]
    assert unmeasured == "; ".join(size for size in others["deepgemm"] if size not in sizes)
    judged = [size for size in sizes if size in others["plain_64"]]
    missed_64 = {size: own[size, 64]["tflops"] / others["plain_64"][size] for size in judged}
    missed_64 = {size: share for size, share in missed_64.items() if share < 1}
    said, missed, unmeasured = found["main loop alone, per 64: at least the plain kernel's"]
    assert said == f"{len(judged) - len(missed_64)} of {len(judged)} points"
    assert missed == "; ".join(f"{size}: {share:.3f}" for size, share in missed_64.items())
    assert unmeasured == "; ".join(size for size in others["plain_64"] if size not in sizes)


def test_what_was_not_measured_is_said_in_the_page() -> None:
    """Distinct routing: its yardsticks where none ran, and each T of the sweep from 512 up that it has not."""
    distinct, ours, found = by_point("distinct"), by_point("sweep"), targets()
    for column, text in (
        ("share_read", "of the plain read, T = 8 to 128: at least 0.92"),
        ("share_read", "of the plain read, T = 1: at least 0.70"),
        ("share_compute", "of our dense GEMMs, T >= 2048: at least 0.90"),
    ):
        nothing = all(row[column] is None for row in distinct.values())
        assert (found[f"distinct routing, {text}"] == ("not measured", "", "")) is nothing, text
    text = "distinct routing, no valley: TFLOP/s at least 0.97 of the best at a smaller T >= 512"
    for preset in PEERS["shapes"]:
        lacking = [t for own, t in ours if own == preset and t > 512 and (preset, t) not in distinct]
        part = f"{preset} T = {', '.join(map(str, lacking))}" if (preset, 1) in distinct else preset
        assert (part in found[text][2].split("; ")) is bool(lacking), preset


def ends(words: str) -> tuple[float, float]:
    """'3.9 to 6.1 % less', '0.5 % more', 'between 0.5 % more and 0.8 % less' -> least and most per cent less."""
    if words.startswith("between"):
        values = [number(value) for value in re.findall(r"([\d.]+) %", words)]
        return -values[0], values[1]
    values = [number(value) * (-1 if words.endswith("more") else 1) for value in re.findall(r"\d+\.\d", words)]
    return min(values), max(values)


def test_granularity_in_the_page() -> None:
    ours, per_128 = by_point("sweep"), by_point(FOR_128)
    sentence = r"instead of 64 \((.+?)\): from T = 512 up ([^,]+), at T <= 128 (.+?(?:less|more))\."
    ((presets, *said),) = re.findall(sentence, " ".join(page.PAGE.read_text().split()))
    assert presets == ", ".join(dict.fromkeys(preset for preset, _ in per_128))
    saved = {place: 100 * (1 - own["us"] / ours[place]["us"]) for place, own in per_128.items()}
    large = [percent for (_, tokens), percent in saved.items() if tokens >= 512]
    small = [percent for (_, tokens), percent in saved.items() if tokens <= 128]
    for words, percents in zip(said, (large, small), strict=True):
        assert ends(words) == pytest.approx((min(percents), max(percents)), abs=0.051), words
