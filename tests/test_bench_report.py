"""The README's results: what is rendered from a result, what each target says, and the command. No GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kernel import __main__ as cli
from kernel.bench import report, results
from kernel.bench.targets import TARGETS, Target, verdict, with_share_before
from kernel.build import EnvironmentMissing, sources_sha256
from tests import command_line

ROW = {"preset": "dsv4_flash", "routing": "folded", "regime": "l2 flushed", "granularity": 64, "T": 1, "us": 74.67}
ROW |= {"tflops": 4.04, "hbm_gb_s": 2025, "share_floor": 0.625, "share_read": 0.562, "share_compute": 0.634}
ROW |= {"us_spread": 0.5, "ratio_best": 1.156, "ratio_pr323": 1.156, "ratio_pr383": None}
RUN = {
    "device": "NVIDIA H200",
    "driver": "580",
    "date": "2026-11-24",
    "versions": {},
    "sources_sha256": sources_sha256(),
}
SWEEP = RUN | {"what": "one rank; median of 20, us_spread is half", "method": "profiler", "regime": "l2 flushed"}
EMPTY = f"# title\n\n{report.START}\n{report.END}\n\nthe end\n"


def sweep(*rows: dict[str, Any]) -> dict[str, Any]:
    return SWEEP | {"rows": [ROW | row for row in rows]}


def said(text: str, rows: list[dict[str, Any]], result: str = "sweep") -> tuple[int, int, str]:
    """What the one target whose text begins so says of these rows."""
    (target,) = (target for target in TARGETS if target.text.startswith(text) and target.result == result)
    return verdict(target, with_share_before([ROW | row for row in rows]))


class TestRender:
    def test_a_preset(self) -> None:
        text = report.render({"sweep": sweep({"T": 8192, "us": 2548.23, "ratio_best": None}, {})})
        assert text.startswith(
            "**Time.** NVIDIA H200, driver 580, 2026-11-24: one rank; median of 20; profiler; L2 flu"
        )
        assert "| dsv4_flash, T | 1 | 8 | 32 | 128 | 512 | 1024 | 2048 | 4096 | 8192 |" in text
        assert "| us | 74.7 |  |  |  |  |  |  |  | 2,548 |" in text
        assert "| GB/s | 2,025 |" in text
        assert "| of the plain read | 0.56 |" in text
        assert "| of the best | 1.16 |  |  |  |  |  |  |  |  |" in text
        assert "| of the best: at most 1 | 0 of 1 points | dsv4_flash 1.156 at T = 1 |" in text
        assert max(map(len, text.partition("|")[0].splitlines())) <= 120

    def test_a_row_of_another_kind_is_left_out(self) -> None:
        others = ({"granularity": 128}, {"routing": "distinct"}, {"regime": "sustained"})
        rows = [{"us": 10.0} | other for other in others]
        assert report.render({"sweep": sweep({}, *rows)}) == report.render({"sweep": sweep({})})

    def test_a_missing_file_has_no_line(self) -> None:
        text = report.render({"sweep": sweep({})})
        assert not any(word in text for word in ("| distinct", "| sustained", "| scales per 128", "cuBLASLt |"))

    def test_other_files_have_theirs(self) -> None:
        found = {
            "sweep": sweep({}),
            "distinct": RUN | {"rows": [ROW | {"routing": "distinct", "us": 68.11, "ratio_best": 0.94}]},
            "sustained": RUN | {"rows": [ROW | {"regime": "sustained", "us": 63.65}]},
            "granularity_128": RUN | {"rows": [ROW | {"granularity": 128, "us": 72.74, "ratio_best": 1.126}]},
            "dense": RUN
            | {
                "rows": [
                    {"group": group, "m": 8192, "n": 4096, "k": 2048, "tflops": tflops, "cublaslt_tflops": 1250}
                    for group, tflops in ((128, 987), (64, 842))
                ]
            },
        }
        text = report.render(found)
        assert "| distinct routing, us | 68.1 |" in text
        assert "| distinct routing, of the best | 0.94 |" in text
        assert "| sustained, us | 63.6 |" in text
        assert "| scales per 128, us | 72.7 |" in text
        assert "| scales per 128, of the best | 1.13 |" in text
        assert "| 8192 x 4096 x 2048 | 987 | 842 | 1,250 |" in text
        assert "| distinct routing, of the best: at most 1 | 1 of 1 points |  |" in text

    def test_other_presets_are_folded_away(self) -> None:
        text = report.render({"sweep": sweep({"preset": "glm"}, {})})
        assert "<details>\n<summary>glm</summary>\n\n| glm, T | 1 |" in text
        assert text.count("<details>") == text.count("</details>") == 1

    def test_a_share_is_shown_where_it_binds(self) -> None:
        text = report.render({"sweep": sweep(*({"T": tokens} for tokens in report.TOKENS))})
        assert "| of the plain read | 0.56 | 0.56 | 0.56 | 0.56 | 0.56 |  |  |  |  |" in text
        assert "| of our dense GEMMs |  |  |  |  | 0.63 | 0.63 | 0.63 | 0.63 | 0.63 |" in text

    def test_nothing_measured(self) -> None:
        assert report.render({}).startswith("No time of the kernel is quoted here")


class TestTargets:
    def test_not_slower_than_the_best(self) -> None:
        rows = [{}, {"T": 2, "ratio_best": 1.2}, {"T": 8, "ratio_best": 1.0}, {"T": 9, "ratio_best": None}]
        met = "dsv4_flash 2, worst 1.200 at T = 2 (T = 1, 2)"
        assert said("of the best: at most 1", rows) == (1, 3, met)
        assert said("of the best: at most 1", [row | {"preset": "glm"} for row in rows[:1]])[2] == "glm 1.156 at T = 1"

    def test_faster_up_to_512(self) -> None:
        rows = [{"T": 512, "ratio_best": 0.95}, {"T": 511, "ratio_best": 0.951}, {"T": 513, "ratio_best": 2.0}]
        assert said("of the best, T <= 512", rows) == (1, 2, "dsv4_flash 0.951 at T = 511")

    def test_faster_by_a_third_from_2048(self) -> None:
        rows = [{"T": 2047, "ratio_best": 1.0}, {"T": 2048, "ratio_best": 0.769}, {"T": 8192, "ratio_best": 0.77}]
        assert said("of the best, T >= 2048", rows) == (1, 2, "dsv4_flash 0.770 at T = 8192")

    def test_dense_rate_from_2048(self) -> None:
        rows = [{"T": 2048, "share_compute": 0.9}, {"T": 4096, "share_compute": 0.88}, {"T": 1024}]
        assert said("of our dense GEMMs", rows) == (1, 2, "dsv4_flash 0.880 at T = 4096")

    def test_reading_rate(self) -> None:
        rows = [{"T": 1, "share_read": 0.7}, {"T": 4, "share_read": 0.1}, {"T": 8, "share_read": 0.919}]
        rows += [{"T": 128, "share_read": 0.92}, {"T": 192, "share_read": 0.1}]
        assert said("of the plain read, T = 8", rows) == (1, 2, "dsv4_flash 0.919 at T = 8")
        assert said("of the plain read, T = 1:", rows) == (1, 1, "")
        assert said("of the plain read, T = 1:", [{}]) == (0, 1, "dsv4_flash 0.562 at T = 1")

    def test_no_valley(self) -> None:
        """Of the best so far, from T = 512 up: a slow rise after a fall is still below."""
        rates = {256: 900.0, 512: 500.0, 640: 660.0, 768: 600.0, 1024: 640.0, 2048: 641.0}
        rows = [{"T": tokens, "tflops": rate} for tokens, rate in rates.items()]
        assert said("no valley", rows) == (2, 4, "dsv4_flash 2, worst 0.909 at T = 768 (T = 768, 1024)")

    def test_every_point_missed(self) -> None:
        rows = [{"T": tokens, "share_read": 0.8} for tokens in (8, 16)]
        assert said("of the plain read, T = 8", rows)[2] == "dsv4_flash all 2, worst 0.800 at T = 8"

    def test_presets_are_told_apart(self) -> None:
        rows = [{"T": 512, "tflops": 900.0}, {"preset": "glm", "T": 1024, "tflops": 600.0}]
        assert said("no valley", rows) == (0, 0, "")

    @pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.text} {target.result}")
    def test_a_target_has_one_limit_and_a_result(self, target: Target) -> None:
        assert (target.most is None) != (target.least is None)
        assert target.result in results.POINTS

    def test_no_two_targets_read_alike(self) -> None:
        assert len({target.text for target in TARGETS}) == len(TARGETS)


class TestCommand:
    @pytest.fixture(autouse=True)
    def places(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(report, "README", tmp_path / "README.md")
        monkeypatch.setattr(report, "RESULTS", tmp_path)
        monkeypatch.setattr(report.plot, "check", lambda path: None)
        monkeypatch.setattr(report.plot, "plot", lambda result, path: path.write_text("<svg>\n</svg>\n"))
        report.README.write_text(EMPTY)
        (tmp_path / "sweep.json").write_text(json.dumps(sweep({})))

    def invoke(self, *arguments: str) -> tuple[int, str]:
        return command_line.invoke(cli.app, "report", *arguments)

    def test_written_once(self, tmp_path: Path) -> None:
        status, text = self.invoke("--check")
        assert status == 1
        assert "not of kernel/results/*.json: README.md, kernel/results/sweep.svg; python -m kernel report" in text
        assert report.README.read_text() == EMPTY
        assert self.invoke() == (0, "written: README.md, kernel/results/sweep.svg\n")
        rendered = report.render(results.read(tmp_path))
        assert report.README.read_text() == EMPTY.replace(report.START, f"{report.START}\n{rendered}")
        assert self.invoke("--check")[0] == 0
        assert self.invoke() == (0, "README.md and its picture are of kernel/results/*.json\n")

    def test_other_results_are_told(self, tmp_path: Path) -> None:
        self.invoke()
        (tmp_path / "sweep.json").write_text(json.dumps(sweep({"us_spread": 1.0})))
        status, text = self.invoke("--check")
        assert status == 1
        assert "json: kernel/results/sweep.svg;" in text
        assert self.invoke()[0] == self.invoke("--check")[0] == 0
        report.README.write_text(report.README.read_text().replace("| 74.7 |", "| 70.7 |"))
        status, text = self.invoke("--check")
        assert status == 1
        assert "json: README.md;" in text

    def test_nothing_measured_needs_no_picture(self, tmp_path: Path) -> None:
        (tmp_path / "sweep.json").unlink()
        assert self.invoke() == (0, "written: README.md\n")
        assert "No time of the kernel is quoted here" in report.README.read_text()
        assert self.invoke("--check")[0] == 0

    def test_without_matplotlib_nothing_is_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(path: Path) -> None:
            raise EnvironmentMissing("--plot needs matplotlib")

        monkeypatch.setattr(report.plot, "check", missing)
        assert self.invoke() == (3, "environment: --plot needs matplotlib\n")
        assert report.README.read_text() == EMPTY

    @pytest.mark.parametrize(
        ("readme", "message"),
        [
            ("# title\n", f"README.md must have the marker {report.START} once and has it 0 times"),
            (f"{report.START}\n", f"the marker {report.END} once and has it 0 times"),
            (EMPTY + report.START, f"the marker {report.START} once and has it 2 times"),
            (f"{report.END}\n{report.START}\n", f"the marker {report.END} after {report.START}"),
        ],
    )
    @pytest.mark.parametrize("arguments", [(), ("--check",)])
    def test_a_marker_is_missing(self, readme: str, message: str, arguments: tuple[str, ...]) -> None:
        report.README.write_text(readme)
        status, text = self.invoke(*arguments)
        assert status == 1
        assert message in text
        assert report.README.read_text() == readme

    def test_no_readme(self) -> None:
        report.README.unlink()
        assert self.invoke() == (1, "README.md is missing\n")

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
                json.dumps(sweep({}) | {"sources_sha256": "0"}),
                "sweep.json is stale, of other kernel sources",
            ),
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
