"""What public kernels took: the figures that are quoted are these, and each says where it is from. No GPU."""

from __future__ import annotations

import hashlib
import json

import pytest

from megaproof.bench import peers
from megaproof.bench.measure import main_loop
from megaproof.bench.model.chips import CHIPS, H200
from megaproof.bench.model.roofline import RANKS
from megaproof.bench.report import derived
from megaproof.quant.shapes import SHAPES

FILE = peers.PEERS["h200"]
QUOTED = "8e42918d979d563d4e30a481b0f4e8317e7420eab2fb364f4c5896d96740632d"
"""sha256 of all that the page and the targets compare with; a figure that is put right changes it, with a reason."""


def test_quoted_figures_stay_as_they_were_measured() -> None:
    quoted = {name: FILE[name] for name in ("us", "us_distinct", "shapes")} | {"dense": FILE["dense"]["tflops"]}
    assert hashlib.sha256(json.dumps(quoted, sort_keys=True).encode()).hexdigest() == QUOTED


@pytest.mark.parametrize("folder", peers.PEERS)
def test_a_file_is_of_a_chip_and_of_our_shapes(folder: str) -> None:
    own = peers.PEERS[folder]
    assert folder in {chip.folder for chip in CHIPS.values()}
    for name, shape in own["shapes"].items():
        ours = SHAPES[name]
        local = {"experts_local": ours.experts // RANKS, "topk": ours.topk}
        assert shape == {"h": ours.hidden, "i": ours.intermediate, **local}
    assert set(own["us_distinct"]) <= set(own["us"]) == set(own["shapes"])


@pytest.mark.parametrize("folder", peers.PEERS)
def test_every_figure_is_positive_and_has_a_source(folder: str) -> None:
    own = peers.PEERS[folder]
    assert {"what", "device", "date", "source", "method"} <= set(own)
    assert set(own["source"]) <= set(peers.NAMES), "the columns of a result"
    again = own.get("second_run", {"source": {}, "us": {}})
    for source, tables in (
        (own["source"], [*own["us"].values(), *own["us_distinct"].values()]),
        (own["dense"]["source"], [own["dense"]["tflops"]]),
        (again["source"], again["us"].values()),
    ):
        assert all(set(table) <= set(source) for table in tables)
        assert all(figure > 0 for table in tables for column in table.values() for figure in column.values())


def test_a_point() -> None:
    assert peers.at(H200, "dsv4_flash", "folded", 8) == {"pr323": 178.6, "pr383": 177.1, "grouped_gemms": 208.7}
    assert peers.at(H200, "dsv4_pro", "distinct", 8192) == {"pr323": 7594.0, "pr383": 8115.4, "grouped_gemms": None}
    for nobody in (peers.at(H200, "glm", "distinct", 7), peers.at(None, "dsv4_flash", "folded", 8)):
        assert nobody == dict.fromkeys(peers.NAMES)
    assert set(peers.NAMES) - set(peers.FUSED) == {"grouped_gemms"}, "a whole layer is compared with whole layers"


def test_dense_rates_are_of_our_sizes() -> None:
    rates = FILE["dense"]["tflops"]
    assert rates.keys() == {name for _, name in derived.REFERENCES.values()}
    assert list(rates["plain_128"]) == list(rates["plain_64"])
    assert set(rates["plain_128"]) <= {" x ".join(map(str, size)) for size in main_loop.SIZES}


def test_the_ceilings_follow_from_the_plain_kernel() -> None:
    """Two thirds of a layer are GEMM 1, per 128, one third GEMM 2, per 64; of dsv4_flash both were measured."""
    first = FILE["dense"]["tflops"]["plain_128"]["8192 x 4096 x 4096"]
    second = FILE["dense"]["tflops"]["plain_64"]["8192 x 4096 x 2048"]
    assert 1 / (2 / 3 / first + 1 / 3 / second) == pytest.approx(H200.ceiling_tflops[4096, 2048], rel=0.01)
