"""docs/results.md: what is rendered from a result, and the command. No GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megaproof.bench import __main__ as cli
from megaproof.bench.measure import phases
from megaproof.bench.measure.rows import CLOCK
from megaproof.bench.report import page, results, sections
from megaproof.bench.report.targets import TARGETS
from megaproof.kernel.programs import PINS
from megaproof.tests.support import command_line
from megaproof.toolchain.errors import EnvironmentMissing

ROW = {"preset": "dsv4_flash", "routing": "folded", "regime": "l2 flushed", "granularity": 64, "T": 1, "us": 74.67}
ROW |= {"tflops": 4.04, "hbm_gb_s": 2025, "share_floor": 0.625, "share_read": 0.562, "share_compute": 0.634}
ROW |= {"us_spread": 0.5, "grouped_gemms": 51.5, "ratio_best": 1.156, "ratio_pr323": 1.156, "ratio_pr383": None}
RUN = {
    "device": "NVIDIA H200",
    "driver": "580",
    "date": "2026-11-24",
    "versions": {},
    "code": {"moe": PINS.code()["moe"]},
}
SWEEP = RUN | {"what": "one rank; median of 20, us_spread is half", "method": "profiler", "regime": "l2 flushed"}
EMPTY = f"# title\n\n{page.START}\n{page.END}\n\nthe end\n"


def sweep(*rows: dict[str, Any]) -> dict[str, Any]:
    return SWEEP | {"rows": [ROW | row for row in rows]}


class TestRender:
    def test_a_preset(self) -> None:
        text = page.render({"sweep": sweep({"T": 8192, "us": 2548.23, "ratio_best": None}, {})})
        assert text.startswith(
            "**Time.** NVIDIA H200, driver 580, 2026-11-24: one rank; median of 20; profiler; L2 flu"
        )
        assert "| dsv4_flash, T | 1 | 8 | 32 | 128 | 512 | 1024 | 2048 | 4096 | 8192 |" in text
        assert "| us | 74.7 |  |  |  |  |  |  |  | 2,548 |" in text
        assert "| GB/s | 2,025 |" in text
        assert "| of the plain read | 0.56 |" in text
        assert "| of the best | 1.16 |  |  |  |  |  |  |  |  |" in text
        assert max(map(len, text.partition("|")[0].splitlines())) <= 120

    def test_grouped_gemms(self) -> None:
        text = page.render({"sweep": sweep({"us": 77.25}, {"T": 8, "grouped_gemms": None})})
        assert "| of the grouped GEMMs alone | 1.50 |  |  |" in text

    def test_a_row_of_another_kind_is_left_out(self) -> None:
        others = ({"granularity": 128}, {"routing": "distinct"}, {"regime": "sustained"})
        rows = [{"us": 10.0} | other for other in others]
        assert page.render({"sweep": sweep({}, *rows)}) == page.render({"sweep": sweep({})})

    def test_a_missing_file_has_no_line(self) -> None:
        text, _, targets = page.render({"sweep": sweep({})}).partition("| target |")
        words = ("| distinct", "| sustained", "| scales per 128", "cuBLASLt |", "Time with scales", "| prologue")
        assert not any(word in text for word in words)
        assert "yardsticks" not in text
        assert "| distinct routing, of the best: at most 1 | not measured |  |  |" in targets

    def test_other_files_have_theirs(self) -> None:
        found = {
            "sweep": sweep({}),
            "distinct": RUN | {"rows": [ROW | {"routing": "distinct", "us": 68.11, "ratio_best": 0.94}]},
            "sustained": RUN | {"rows": [ROW | {"regime": "sustained", "us": 63.65}]},
            "granularity_128": RUN | {"rows": [ROW | {"granularity": 128, "us": 72.74, "ratio_best": 1.126}]},
            "baseline": RUN | {"baseline": "triton", "rows": [ROW | {"speedup": 2.346, "differing": 0}]},
        }
        text = page.render(found)
        assert "| distinct routing, us | 68.1 |" in text
        assert "| distinct routing, of the best | 0.94 |" in text
        assert "| sustained, us | 63.6 |" in text
        assert "| scales per 128, us | 72.7 |" in text
        assert "| scales per 128, of the best | 1.13 |" in text
        assert "| scales per 128, of the grouped GEMMs alone | 1.41 |" in text
        assert "| the unfused baseline, of our time | 2.3 |" in text
        assert "GEMMs by triton" in text
        assert "0 elements differ, at 1 points." in " ".join(text.split())

    def test_other_presets_are_folded_away(self) -> None:
        text = page.render({"sweep": sweep({"preset": "glm"}, {})})
        assert "<details>\n<summary>glm</summary>\n\n| glm, T | 1 |" in text
        assert text.count("<details>") == text.count("</details>") == 1

    def test_a_share_is_shown_where_it_binds(self) -> None:
        text = page.render({"sweep": sweep(*({"T": tokens} for tokens in sections.TOKENS))})
        assert "| of the plain read | 0.56 | 0.56 | 0.56 | 0.56 | 0.56 |  |  |  |  |" in text
        assert "| of our dense GEMMs |  |  |  |  | 0.63 | 0.63 | 0.63 | 0.63 | 0.63 |" in text

    def test_nothing_measured(self) -> None:
        assert page.render({}).startswith("No time of the kernel is quoted here")


class TestTargetsTable:
    def test_a_miss_and_what_was_not_measured(self) -> None:
        text = page.render({"sweep": sweep({}, {"T": 2, "ratio_best": 1.0})})
        assert "\n| target | met at | missed at | not measured at |\n|---|---|---|---|\n" in text
        (line,) = (line for line in text.splitlines() if line.startswith("| of the best: at most 1 |"))
        assert line.startswith(
            "| of the best: at most 1 | 1 of 2 points | dsv4_flash T = 1: 1.156 | dsv4_flash T = 4, 8, 16,"
        )
        assert line.endswith("; dsv4_pro; mimo_pro; glm |")

    def test_every_target_has_a_line(self) -> None:
        _, _, table = page.render({"sweep": sweep({})}).partition("| target |")
        assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {each.text}" for each in TARGETS]

    @pytest.mark.parametrize("command", [None, "bench --no-yardsticks"], ids=["with yardsticks", "without"])
    def test_why_distinct_routing_has_no_shares(self, command: str | None) -> None:
        rows = [ROW | {"routing": "distinct", "share_read": None, "share_compute": None}]
        distinct = RUN | {"rows": rows} | ({"command": command} if command else {})
        text = page.render({"sweep": sweep({}), "distinct": distinct})
        assert ("Distinct routing was run without yardsticks" in text) is bool(command)
        assert "| distinct routing, of the plain read, T = 1: at least 0.70 | not measured |  |  |" in text


def dense(*rates: tuple[str, int, int, int]) -> dict[str, Any]:
    """A result of (M x N x K, per 128, per 64, cuBLASLt)."""
    rows = []
    for size, *own, cublaslt in rates:
        m, n, k = map(int, size.split(" x "))
        for group, tflops in zip((128, 64), own, strict=True):
            rows.append({"group": group, "m": m, "n": n, "k": k, "tflops": tflops, "cublaslt_tflops": cublaslt})
    return RUN | {"rows": rows}


class TestDense:
    def test_the_table(self) -> None:
        rates = [("8192 x 4096 x 4096", 1115, 980, 1394), ("8192 x 4096 x 2048", 987, 842, 1250)]
        text = page.render({"sweep": sweep({}), "dense": dense(*rates, ("49152 x 4096 x 2048", 1100, 940, 1375))})
        assert (
            "| M x N x K | per 128 | per 64 | cuBLASLt | per 128 over DeepGEMM | over cuBLASLt | over plain | "
            "per 64 over plain |\n" in text
        )
        assert "| 8192 x 4096 x 4096 | 1,115 | 980 | 1,394 | 0.99 | 0.80 | 0.80 | 0.85 |" in text
        assert "| 8192 x 4096 x 2048 | 987 | 842 | 1,250 |  | 0.79 | 0.77 | 0.79 |" in text
        assert "| 49152 x 4096 x 2048 | 1,100 | 940 | 1,375 |  | 0.80 |  |  |" in text
        assert (
            "| main loop alone, per 128: at least 0.95 of DeepGEMM's or 0.98 of cuBLASLt's | 1 of 3 points | "
            "8192 x 4096 x 2048: - or 0.790; 49152 x 4096 x 2048: - or 0.800 | 8192 x 8192 x 8192;" in text
        )

    @pytest.mark.parametrize(
        ("rates", "words"),
        [
            ([], "Our dense GEMMs write float32. Of"),
            (
                [("8192 x 4096 x 4096", 1115, 980, 1394), ("8192 x 4096 x 2048", 987, 842, 1250)],
                "write float32 and reach 0.77 to 0.80 of a plain dense kernel's rate per 128, 0.79 to 0.85 per 64 "
                "(table of the main loop): this yardstick itself is below the ceiling,",
            ),
            (
                [("8192 x 4096 x 4096", 1400, 980, 1394)],
                "reach 1.00 of a plain dense kernel's rate per 128, 0.85 per 64 (table of the main loop). Of the best",
            ),
            ([("49152 x 4096 x 2048", 1100, 940, 1375)], "Our dense GEMMs write float32. Of"),
        ],
        ids=["not measured", "below", "not below", "nothing to compare with"],
    )
    def test_what_the_yardstick_is_worth(self, rates: list[tuple[str, int, int, int]], words: str) -> None:
        results = {"sweep": sweep({})} | ({"dense": dense(*rates)} if rates else {})
        assert words in " ".join(page.render(results).split())


class TestGranularity:
    @pytest.mark.parametrize(
        ("times", "said"),
        [
            ({}, ""),
            ({256: 50.0}, ""),
            ({512: 96.06, 8192: 93.94}, "from T = 512 up 3.9 to 6.1 % less."),
            ({1: 99.2, 128: 100.5}, "at T <= 128 between 0.5 % more and 0.8 % less."),
            ({128: 100.5, 512: 101.0, 1024: 102.0}, "from T = 512 up 1.0 to 2.0 % more, at T <= 128 0.5 % more."),
            ({512: 94.0}, "from T = 512 up 6.0 % less."),
            ({2: 50.0, 512: 100.0}, "from T = 512 up 0.0 % less."),
        ],
        ids=["none", "between", "less", "both ways", "more", "one", "no pair at T = 2"],
    )
    def test_the_sentence(self, times: dict[int, float], said: str) -> None:
        """Against 100 us with scales per 64, at T that both have."""
        usual = sweep(*({"T": tokens, "us": 100.0} for tokens in (1, 128, 256, 512, 1024, 8192)))
        rows = [ROW | {"T": tokens, "us": us, "granularity": 128} for tokens, us in times.items()]
        text = " ".join(page.render({"sweep": usual, "granularity_128": RUN | {"rows": rows}}).split())
        head = "Time with scales per 128 columns instead of 64 (dsv4_flash): "
        assert (head + said in text) if said else ("Time with scales" not in text)


class TestPhases:
    def rows(self) -> list[dict[str, Any]]:
        """Every phase of role r at T takes 100 r + 10 T + its number."""
        rows = []
        for tokens in (1, 8):
            roles = {
                role: {
                    name: {"mean": 100.0 * r + 10 * tokens + n, "least": 0.0, "most": 999.0}
                    for n, name in enumerate(phases.NAMES)
                    if (name in ("operands", "load")) <= (role == "producer")
                }
                for r, role in enumerate(phases.ROLES)
            }
            rows.append({"preset": "dsv4_flash", "routing": "folded", "T": tokens, "us": 2532.01, "clock_mhz": 1676.5})
            rows[-1]["roles"] = roles
        return rows

    def test_the_table(self) -> None:
        text = page.render({"sweep": sweep({}), "phases": RUN | {"rows": self.rows()}})
        _, _, table = text.partition("| dsv4_flash, folded, T | 1 | 8 |\n|---|---:|---:|\n")
        assert table.partition("\n\n")[0].splitlines() == [
            "| prologue | 110 | 180 |",
            "| wait | 111 | 181 |",
            "| operands | 12.0 | 82.0 |",
            "| l1 | 114 | 184 |",
            "| l1 epilogue | 115 | 185 |",
            "| l2 | 116 | 186 |",
            "| l2 epilogue | 117 | 187 |",
            "| meet | 118 | 188 |",
            "| combine | 119 | 189 |",
            "| the launch, by events | 2,532 | 2,532 |",
            "| SM clock, MHz | 1,676 | 1,676 |",
        ]

    def test_what_it_cannot_see_and_whose_clock_it_is(self) -> None:
        text = " ".join(page.render({"sweep": sweep({}), "phases": RUN | {"rows": self.rows()}}).split())
        assert (
            "cannot see the dispatch warps and the scout, which keep no clock, nor launch and ramp, which are spread "
            "over the phases" in text
        )
        assert f"In the JSON clock_mhz is {CLOCK}." in text

    def test_a_phase_that_no_role_kept_is_blank(self) -> None:
        rows = self.rows()
        del rows[0]["roles"]["producer"]["operands"]
        assert "| operands |  | 82.0 |" in page.render({"sweep": sweep({}), "phases": RUN | {"rows": rows}})

    def test_other_presets_have_tables_of_their_own(self) -> None:
        rows = [*self.rows(), self.rows()[0] | {"preset": "glm", "routing": "distinct"}]
        text = page.render({"sweep": sweep({}), "phases": RUN | {"rows": rows}})
        assert "| glm, distinct, T | 1 |\n|---|---:|\n| prologue | 110 |\n" in text

    def test_names_are_those_of_the_kernel(self) -> None:
        assert [name for name in phases.NAMES if name != "load"] == list(sections.PHASE_LINES)
        assert set(sections.KEEPERS) <= set(phases.ROLES)


class TestCommand:
    @pytest.fixture(autouse=True)
    def places(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(page, "PAGE", tmp_path / "results.md")
        monkeypatch.setattr(page, "RESULTS", tmp_path)
        monkeypatch.setattr(page.plot, "check", lambda path: None)
        monkeypatch.setattr(page.plot, "plot", lambda result, path: path.write_text("<svg>\n</svg>\n"))
        page.PAGE.write_text(EMPTY)
        (tmp_path / "sweep.json").write_text(json.dumps(sweep({})))

    def invoke(self, *arguments: str) -> tuple[int, str]:
        return command_line.invoke(cli.app, "report", *arguments)

    def test_written_once(self, tmp_path: Path) -> None:
        status, text = self.invoke("--check")
        assert status == 1
        assert (
            "not of bench/results/h200/*.json: docs/results.md, bench/results/h200/sweep.svg; python -m bench report"
            in text
        )
        assert page.PAGE.read_text() == EMPTY
        assert self.invoke() == (0, "written: docs/results.md, bench/results/h200/sweep.svg\n")
        rendered = page.render(results.read(tmp_path))
        assert page.PAGE.read_text() == EMPTY.replace(page.START, f"{page.START}\n{rendered}")
        assert self.invoke("--check")[0] == 0
        assert self.invoke() == (0, "docs/results.md and its picture are of bench/results/h200/*.json\n")

    def test_other_results_are_told(self, tmp_path: Path) -> None:
        self.invoke()
        (tmp_path / "sweep.json").write_text(json.dumps(sweep({"us_spread": 1.0})))
        status, text = self.invoke("--check")
        assert status == 1
        assert "json: bench/results/h200/sweep.svg;" in text
        assert self.invoke()[0] == self.invoke("--check")[0] == 0
        page.PAGE.write_text(page.PAGE.read_text().replace("| 74.7 |", "| 70.7 |"))
        status, text = self.invoke("--check")
        assert status == 1
        assert "json: docs/results.md;" in text

    def test_nothing_measured_needs_no_picture(self, tmp_path: Path) -> None:
        (tmp_path / "sweep.json").unlink()
        assert self.invoke() == (0, "written: docs/results.md\n")
        assert "No time of the kernel is quoted here" in page.PAGE.read_text()
        assert self.invoke("--check")[0] == 0

    def test_without_matplotlib_nothing_is_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(path: Path) -> None:
            raise EnvironmentMissing("--plot needs matplotlib")

        monkeypatch.setattr(page.plot, "check", missing)
        assert self.invoke() == (3, "environment: --plot needs matplotlib\n")
        assert page.PAGE.read_text() == EMPTY

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ("# title\n", f"docs/results.md must have the marker {page.START} once and has it 0 times"),
            (f"{page.START}\n", f"the marker {page.END} once and has it 0 times"),
            (EMPTY + page.START, f"the marker {page.START} once and has it 2 times"),
            (f"{page.END}\n{page.START}\n", f"the marker {page.END} after {page.START}"),
        ],
    )
    @pytest.mark.parametrize("arguments", [(), ("--check",)])
    def test_a_marker_is_missing(self, document: str, message: str, arguments: tuple[str, ...]) -> None:
        page.PAGE.write_text(document)
        status, text = self.invoke(*arguments)
        assert status == 1
        assert message in text
        assert page.PAGE.read_text() == document

    def test_no_page(self) -> None:
        page.PAGE.unlink()
        assert self.invoke() == (1, "docs/results.md is missing\n")

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("dense.json", "{", "dense.json is damaged"),
            ("dense.json", "[]", "dense.json is damaged: a result is an object"),
            ("dense.json", json.dumps(RUN | {"what": "", "rows": []}), "dense.json is damaged: a result has rows"),
            (
                "dense.json",
                json.dumps(RUN | {"what": "", "rows": [1]}),
                "dense.json is damaged: row 0: it is no object",
            ),
            (
                "phases.json",
                json.dumps(RUN | {"rows": [{"T": 1}]}),
                "row 0: clock_mhz, preset, roles, routing, us missing",
            ),
            ("other.json", json.dumps(sweep({})), "other.json is none of sweep.json, distinct.json"),
            ("sweep.json", json.dumps(RUN | {"rows": [ROW]}), "sweep.json is damaged: method, regime, what missing"),
            (
                "sweep.json",
                json.dumps(sweep({}) | {"code": {"moe": RUN["code"]["moe"] | {"moe_fast": "0"}}}),
                "sweep.json is stale: its code of moe_fast of moe is not that of cubins.json; measure again",
            ),
            ("sweep.json", json.dumps(sweep({}) | {"code": {"gone": {"k": "0"}}}), "stale: its code of k of gone is"),
            ("sweep.json", json.dumps(sweep({}) | {"code": {}}), "sweep.json is damaged: code names the entries"),
            ("sweep.json", json.dumps(sweep({}) | {"code": {"moe": {}}}), "sweep.json is damaged: code names the"),
            ("sweep.json", json.dumps(sweep({}) | {"code": {"moe": "0"}}), "sweep.json is damaged: code names the"),
            ("sweep.json", json.dumps(sweep({}) | {"complete": False}), "sweep.json: the run was cut short"),
            ("sweep.json", json.dumps(sweep({}) | {"failed": ["T=1: no"]}), "or a point failed; measure again"),
            ("sweep.json", json.dumps(sweep({}, {})), "sweep.json has 1 points twice, the first is dsv4_flash T = 1"),
            ("distinct.json", json.dumps(sweep({})), "distinct.json has no row of distinct, l2 flushed, 64"),
            ("sweep.json", json.dumps(sweep({"granularity": 128})), "sweep.json has no row of folded, l2 flushed, 64"),
        ],
    )
    def test_a_damaged_result(self, tmp_path: Path, name: str, text: str, message: str) -> None:
        (tmp_path / name).write_text(text)
        status, output = self.invoke()
        assert status == 1
        assert message in output

    @pytest.mark.parametrize("key", ["device", "driver"])
    def test_results_of_two_machines(self, tmp_path: Path, key: str) -> None:
        distinct = sweep({"routing": "distinct"}) | {key: "another"}
        (tmp_path / "distinct.json").write_text(json.dumps(distinct))
        message = f"distinct.json has {key} 'another'; it must be sweep.json's, {RUN[key]!r}\n"
        assert self.invoke() == (1, message)

    def test_the_sweep_is_missing(self, tmp_path: Path) -> None:
        (tmp_path / "sweep.json").write_text(json.dumps(sweep({"routing": "distinct"})))
        (tmp_path / "sweep.json").rename(tmp_path / "distinct.json")
        assert self.invoke() == (1, "sweep.json is missing beside distinct.json\n")
