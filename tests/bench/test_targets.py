"""What each target says of rows: who meets it, each miss with its value, and what was not measured. No GPU."""

from __future__ import annotations

from typing import Any

import pytest

from megaproof.bench.measure.points import PEERS
from megaproof.bench.measure.rows import COLUMNS
from megaproof.bench.report import derived, results
from megaproof.bench.report.targets import TARGETS, Target, Verdict, verdict

ROW = {"preset": "dsv4_flash", "T": 1, "us": 74.67, "tflops": 4.04, "grouped_gemms": None}
ROW |= dict.fromkeys(("share_read", "share_compute", "ratio_best"))
Rows = list[dict[str, Any]]
FOR_128 = {"result": "granularity_128"}
DISTINCT = {"result": "distinct"}


def one(text: str, result: str = "sweep") -> Target:
    """The one target whose text begins so."""
    (target,) = (target for target in TARGETS if target.text.startswith(text) and target.result == result)
    return target


def judged(text: str, rows: Rows, result: str = "sweep", **others: Rows) -> Verdict:
    """What a target says of these rows of its result, beside others."""
    found = {name: derived.points([ROW | row for row in own]) for name, own in ({result: rows} | others).items()}
    return verdict(one(text, result), found)


def said(text: str, rows: Rows, result: str = "sweep") -> tuple[int, int, str]:
    """(points that meet it, points, the others)."""
    found = judged(text, rows, result)
    return found.met, found.points, found.misses


def at(column: str, values: dict[int, float]) -> Rows:
    """Rows of these T with these values."""
    return [{"T": tokens, column: value} for tokens, value in values.items()]


class TestLimits:
    """A row on either side of every limit, and of every T where a target begins or ends."""

    def test_not_slower_than_the_best(self) -> None:
        rows = [*at("ratio_best", {1: 1.156, 2: 1.2, 8: 1.0, 16: 1.001}), {"T": 9}]
        assert said("of the best: at most 1", rows) == (1, 4, "dsv4_flash T = 1: 1.156, 2: 1.200, 16: 1.001")

    def test_faster_up_to_512(self) -> None:
        rows = at("ratio_best", {512: 0.95, 511: 0.951, 513: 2.0})
        assert said("of the best, T <= 512", rows) == (1, 2, "dsv4_flash T = 511: 0.951")

    def test_faster_by_a_third_from_2048(self) -> None:
        rows = at("ratio_best", {2047: 1.0, 2048: 0.769, 8192: 0.77})
        assert said("of the best, T >= 2048", rows) == (1, 2, "dsv4_flash T = 8192: 0.770")

    @pytest.mark.parametrize(
        "text, result",
        [
            ("of our dense GEMMs", "sweep"),
            ("distinct routing, of our dense GEMMs", "distinct"),
            ("scales per 128, of our dense GEMMs", "granularity_128"),
        ],
    )
    def test_dense_rate_from_2048(self, text: str, result: str) -> None:
        rows = at("share_compute", {2047: 0.1, 2048: 0.9, 4096: 0.899})
        assert said(text, rows, result) == (1, 2, "dsv4_flash T = 4096: 0.899")

    def test_grouped_gemms_per_128(self) -> None:
        rows = [
            {"T": 1, "us": 900.0, "grouped_gemms": 100.0},
            {"T": 2048, "us": 110.0, "grouped_gemms": 100.0},
            {"T": 4096, "us": 900.0},
            {"T": 8192, "us": 110.2, "grouped_gemms": 100.0},
        ]
        text = "scales per 128, of the grouped GEMMs alone, T >= 2048: at most 1.10"
        assert said(text, rows, "granularity_128") == (1, 2, "dsv4_flash T = 8192: 1.102")

    @pytest.mark.parametrize("preset, most, missed", [("dsv4_flash", 2200.0, "2,201"), ("dsv4_pro", 5300.0, "5,301")])
    def test_stretch(self, preset: str, most: float, missed: str) -> None:
        rows = [{"T": 8192, "preset": preset, "us": most}, {"T": 4096, "preset": preset, "us": 9999.0}]
        rows.append({"T": 8192, "preset": "glm", "us": 9999.0})
        assert said(f"stretch, {preset}, T = 8192: at most {most:,.0f} us", rows) == (1, 1, "")
        rows[0]["us"] = most + 0.6
        assert said(f"stretch, {preset},", rows) == (0, 1, f"{preset} T = 8192: {missed}")

    def test_ceilings(self) -> None:
        """0.88 of 1275 is 1122, of 1320 it is 1161.6."""
        rows = [
            {"T": 8192, "tflops": 1122.0},
            {"T": 8192, "preset": "dsv4_pro", "tflops": 1161.0},
            {"T": 8192, "preset": "glm", "tflops": 1.0},
            {"T": 4096, "tflops": 1.0},
        ]
        assert said("stretch, of the flushed ceiling", rows) == (1, 2, "dsv4_pro T = 8192: 0.880")
        rows[0]["tflops"] = 1121.9
        assert said("stretch, of the flushed ceiling", rows)[0] == 0

    @pytest.mark.parametrize("before, result", [("", "sweep"), ("distinct routing, ", "distinct")])
    def test_reading_rate(self, before: str, result: str) -> None:
        rows = at("share_read", {1: 0.7, 4: 0.1, 8: 0.919, 128: 0.92, 192: 0.1})
        assert said(f"{before}of the plain read, T = 8", rows, result) == (1, 2, "dsv4_flash T = 8: 0.919")
        assert said(f"{before}of the plain read, T = 1:", rows, result) == (1, 1, "")
        rows[0]["share_read"] = 0.699
        assert said(f"{before}of the plain read, T = 1:", rows, result) == (0, 1, "dsv4_flash T = 1: 0.699")

    @pytest.mark.parametrize("before, result", [("", "sweep"), ("distinct routing, ", "distinct")])
    def test_no_valley(self, before: str, result: str) -> None:
        rates = {256: 900.0, 512: 500.0, 640: 660.0, 768: 600.0, 1024: 640.2, 2048: 640.0}
        missed = "dsv4_flash T = 768: 0.909, 2048: 0.970"
        assert said(f"{before}no valley", at("tflops", rates), result) == (2, 4, missed)


class TestMisses:
    def test_presets_one_after_the_other(self) -> None:
        rows = at("ratio_best", {1: 1.022, 2: 1.017})
        rows += [{"preset": "glm", "T": 1, "ratio_best": 1.101}]
        assert said("of the best: at most 1", rows)[2] == "dsv4_flash T = 1: 1.022, 2: 1.017; glm T = 1: 1.101"

    def test_none(self) -> None:
        assert said("of the best: at most 1", at("ratio_best", {1: 0.9})) == (1, 1, "")


class TestNotMeasured:
    def test_a_result_that_is_missing(self) -> None:
        found = verdict(one("distinct routing, of the best: at most 1", "distinct"), {"sweep": derived.points([ROW])})
        assert (found.met, found.points, found.misses) == (0, 0, "")

    def test_a_column_that_is_empty(self) -> None:
        """Run without yardsticks: the sweep says where they could have been."""
        sweep = at("share_read", {8: 0.9, 128: 0.9, 192: 0.9})
        found = judged("distinct routing, of the plain read, T = 8", [{"T": 8}, {"T": 128}], "distinct", sweep=sweep)
        assert found == Verdict(0, 0, "", "dsv4_flash")

    def test_points_of_the_sweep_that_another_result_lacks(self) -> None:
        rates = {512: 500.0, 640: 600.0, 768: 650.0, 1024: 700.0}
        glm = [row | {"preset": "glm"} for row in at("tflops", rates)]
        distinct = at("tflops", {512: 500.0, 1024: 700.0})
        found = judged("distinct routing, no valley", distinct, "distinct", sweep=at("tflops", rates) + glm)
        assert found == Verdict(1, 1, "", "dsv4_flash T = 640, 768; glm")

    @pytest.mark.parametrize("result, table", [("sweep", "us"), ("distinct", "us_distinct")])
    def test_points_of_the_peers(self, result: str, table: str) -> None:
        """Every T at which one of the two fused kernels was measured is to be compared."""
        text = "of the best: at most 1" if result == "sweep" else "distinct routing, of the best: at most 1"
        other, *rest = PEERS[table]
        assert other == "dsv4_flash"
        tokens = [int(t) for t in PEERS[table][other]["pr323"] if int(t) != 1]
        found = judged(text, at("ratio_best", {1: 0.9}), result)
        assert found.unmeasured == "; ".join([f"dsv4_flash T = {', '.join(map(str, tokens))}", *rest])
        assert judged(text, at("ratio_best", dict.fromkeys([1, *tokens], 0.9)), result).unmeasured == "; ".join(rest)

    def test_only_where_the_target_speaks(self) -> None:
        found = judged("of the best, T >= 2048", at("ratio_best", {2048: 0.7, 4096: 0.7, 8192: 0.7}))
        assert found == Verdict(3, 3, "", "dsv4_pro; mimo_pro; glm")
        found = judged("stretch, dsv4_pro", [{"T": 8192}])
        assert found == Verdict(0, 0, "", "")

    def test_grouped_gemms_per_128(self) -> None:
        rows = [{"T": tokens, "us": 1.0, "grouped_gemms": 1.0} for tokens in (1, 8, 32, 128, 2048)]
        found = judged("scales per 128, of the grouped GEMMs alone", rows, "granularity_128")
        assert found == Verdict(1, 1, "", "dsv4_flash T = 8192; dsv4_pro; mimo_pro; glm")


class TestDense:
    CUBE, OTHER = "8192 x 8192 x 8192", "8192 x 4096 x 2048"

    def said(self, text: str, *rates: tuple[str, int, int]) -> Verdict:
        """Of sizes with a rate of ours, the same per 128 and per 64, and one of cuBLASLt's."""
        rows = []
        for size, ours, cublaslt in rates:
            own = dict(zip("mnk", map(int, size.split(" x ")), strict=True))
            rows += [own | {"group": g, "tflops": ours, "cublaslt_tflops": cublaslt} for g in (128, 64)]
        return verdict(one(text, "dense"), {"dense": derived.dense(rows)})

    @pytest.mark.parametrize(
        "ours, cublaslt, miss",
        [
            (1298, 9999, ""),
            (1297, 1323, ""),
            (1297, 1324, "8192 x 8192 x 8192: 0.949 or 0.980"),
            (1262, 1466, "8192 x 8192 x 8192: 0.924 or 0.861"),
        ],
        ids=["0.95 of DeepGEMM", "0.98 of cuBLASLt", "neither, closely", "neither"],
    )
    def test_one_of_two(self, ours: int, cublaslt: int, miss: str) -> None:
        found = self.said("main loop alone, per 128", (self.CUBE, ours, cublaslt))
        assert (found.met, found.points, found.misses) == (int(not miss), 1, miss)

    def test_where_deepgemm_was_not_measured(self) -> None:
        found = self.said("main loop alone, per 128", (self.OTHER, 988, 1253), ("49152 x 4096 x 2048", 1370, 1371))
        assert (found.met, found.points, found.misses) == (1, 2, f"{self.OTHER}: - or 0.789")

    def test_sizes_of_deepgemm_that_we_did_not_measure(self) -> None:
        found = self.said("main loop alone, per 128", (self.CUBE, 1366, 1466), (self.OTHER, 988, 1253))
        assert found.unmeasured == "8192 x 6144 x 7168; 4096 x 7168 x 4096; 8192 x 4096 x 4096"

    def test_per_64(self) -> None:
        found = self.said("main loop alone, per 64", (self.CUBE, 1180, 1), (self.OTHER, 1063, 1), ("1 x 1 x 1", 1, 1))
        assert found == Verdict(1, 2, f"{self.OTHER}: 0.999", "8192 x 4096 x 4096; 8192 x 7168 x 3072")


class TestTheTargets:
    @pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.text)
    def test_one_limit_of_a_known_column(self, target: Target) -> None:
        assert (target.most is None) != (target.least is None)
        if target.result == "dense":
            (row,) = derived.dense([{"m": 1, "n": 1, "k": 1, "group": 64, "tflops": 1, "cublaslt_tflops": 1}])
            assert target.column in derived.REFERENCES
            assert target.alternative is None or target.alternative[0] in row
        else:
            assert target.result in results.POINTS
            assert target.column in {*COLUMNS, *derived.points([ROW])[0]}
            assert target.alternative is None

    def test_no_two_read_alike(self) -> None:
        assert len({target.text for target in TARGETS}) == len(TARGETS)

    @pytest.mark.parametrize(
        "target", [target for target in TARGETS if target.result == "distinct"], ids=lambda target: target.text
    )
    def test_both_routings_have_the_same_limit(self, target: Target) -> None:
        folded = one(target.text.removeprefix("distinct routing, "))
        for name in ("column", "first", "last", "most", "least", "presets"):
            assert getattr(folded, name) == getattr(target, name)

    def test_distinct_routing_has_all_but_the_stretch(self) -> None:
        folded = {target.text for target in TARGETS if target.result == "sweep" and "stretch" not in target.text}
        distinct = {target.text for target in TARGETS if target.result == "distinct"}
        assert distinct == {f"distinct routing, {text}" for text in folded}
