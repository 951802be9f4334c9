"""Columns that follow from a result's and stand in none: what they are over, and where they are not. No GPU."""

from __future__ import annotations

from typing import Any

import pytest

from megaproof.bench.measure import main_loop
from megaproof.bench.measure.points import PEERS
from megaproof.bench.model.roofline import CEILING_TFLOPS
from megaproof.bench.report import derived

ROW = {"preset": "dsv4_flash", "T": 1, "us": 77.25, "tflops": 1020.0, "grouped_gemms": 51.5}


def rows(*own: dict[str, Any]) -> list[dict[str, Any]]:
    return derived.points([ROW | each for each in own])


class TestPoints:
    def test_what_was_there_stays(self) -> None:
        (row,) = rows({})
        assert {name: row[name] for name in ROW} == ROW

    def test_of_the_best_before_from_512(self) -> None:
        """Of the best so far: a slow rise after a fall is still below."""
        rates = {256: 900.0, 512: 500.0, 640: 660.0, 768: 330.0, 1024: 640.0}
        found = rows(*({"T": tokens, "tflops": rate} for tokens, rate in rates.items()))
        assert [row["share_before"] for row in found] == [None, None, 1.32, 0.5, pytest.approx(0.9697, abs=1e-4)]

    def test_presets_are_told_apart(self) -> None:
        found = rows({"T": 512, "tflops": 900.0}, {"preset": "glm", "T": 1024, "tflops": 600.0})
        assert [row["share_before"] for row in found] == [None, None]

    @pytest.mark.parametrize("preset, ceiling", [("dsv4_flash", 1275), ("dsv4_pro", 1320), ("mimo_pro", 1275)])
    def test_of_the_ceiling_of_its_shape(self, preset: str, ceiling: int) -> None:
        (row,) = rows({"preset": preset})
        assert row["share_ceiling"] == 1020.0 / ceiling
        assert ceiling in CEILING_TFLOPS.values()

    @pytest.mark.parametrize("preset", ["smoke", "h512-i256-e4-k2"])
    def test_a_shape_without_ceiling(self, preset: str) -> None:
        assert rows({"preset": preset})[0]["share_ceiling"] is None

    def test_over_the_grouped_gemms(self) -> None:
        assert [row["ratio_grouped"] for row in rows({}, {"grouped_gemms": None})] == [1.5, None]


class TestDense:
    def test_a_row_a_size(self) -> None:
        size = {"m": 8192, "n": 8192, "k": 8192, "cublaslt_tflops": 1400}
        found = derived.dense([size | {"group": 128, "tflops": 1035}, size | {"group": 64, "tflops": 885}])
        assert found == [
            {
                "size": "8192 x 8192 x 8192",
                "tflops_128": 1035,
                "tflops_64": 885,
                "cublaslt_tflops": 1400,
                "share_cublaslt": 1035 / 1400,
                "share_deepgemm": 1035 / 1366,
                "share_plain_128": 0.75,
                "share_plain_64": 0.75,
            }
        ]

    def test_one_promotion_alone_at_a_size_that_nobody_measured(self) -> None:
        (row,) = derived.dense([{"m": 128, "n": 256, "k": 384, "group": 64, "tflops": 9, "cublaslt_tflops": 10}])
        assert row["size"] == "128 x 256 x 384"
        assert {row[column] for column in (*derived.REFERENCES, "share_cublaslt")} == {None}


class TestReferences:
    """The figures of others in peers_h200.json."""

    def test_deepgemm(self) -> None:
        assert PEERS["dense"]["tflops"]["deepgemm"] == {
            "8192 x 8192 x 8192": 1366,
            "8192 x 6144 x 7168": 1323,
            "4096 x 7168 x 4096": 1164,
            "8192 x 4096 x 4096": 1123,
        }

    def test_the_plain_kernel(self) -> None:
        """Of four of our own sizes, per 128 and per 64."""
        per_128, per_64 = (PEERS["dense"]["tflops"][name] for name in ("plain_128", "plain_64"))
        assert {size: (rate, per_64[size]) for size, rate in per_128.items()} == {
            "8192 x 4096 x 4096": (1394, 1153),
            "8192 x 8192 x 8192": (1380, 1180),
            "8192 x 4096 x 2048": (1284, 1064),
            "8192 x 7168 x 3072": (1396, 1159),
        }
        assert list(per_128) == list(per_64)
        assert set(per_128) <= {" x ".join(map(str, size)) for size in main_loop.SIZES}

    def test_where_they_come_from(self) -> None:
        section = PEERS["dense"]
        assert "one NVIDIA H200, L2 flushed" in section["what"]
        assert section["source"].keys() == section["tflops"].keys() == {name for _, name in derived.REFERENCES.values()}
        for name, words in {"deepgemm": "DeepGEMM", "plain_128": "per 128", "plain_64": "per 64"}.items():
            assert words in section["source"][name]

    def test_the_ceilings_follow(self) -> None:
        """Two thirds of a layer are GEMM 1, per 128, one third GEMM 2, per 64; of dsv4_flash both were measured."""
        table = PEERS["dense"]["tflops"]
        first, second = table["plain_128"]["8192 x 4096 x 4096"], table["plain_64"]["8192 x 4096 x 2048"]
        assert 1 / (2 / 3 / first + 1 / 3 / second) == pytest.approx(CEILING_TFLOPS[4096, 2048], rel=0.01)
