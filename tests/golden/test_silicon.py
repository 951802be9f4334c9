"""The captures of chips: committed data against the atoms, the figures they must show, and the capture itself."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from megaproof.golden import capture, silicon, tiles, triples
from megaproof.kernel.programs import probe
from megaproof.quant import atoms, tables
from megaproof.toolchain.launch import Device

TINY = capture.Effort(parts=1, outputs=1, fma_parts=1, triples=1 << 12, inputs=1 << 12, chunk=1 << 11)
_GH100 = {
    "rcp": "c408381446132e07fa5581e930dc33fb790bea7ec4276ef3621e322df2492a55",
    "ex2": "b2a42c4a626469c986e33e43f16f41bde9d84de94347cd9ceaa1bd68d36bcdf0",
}
TABLE_SHA256: dict[str, dict[str, str]] = {"H100": _GH100, "H200": _GH100}
"""Chip -> table -> sha256 of the decoded table, pinned a second time: table and manifest cannot drift together."""


def test_some_chip_is_measured() -> None:
    assert tables.DEFAULT_CHIP in silicon.chips()


@pytest.mark.parametrize("chip", silicon.chips())
def test_capture_is_whole(chip: str) -> None:
    """Every file has its sha256, and every sweep took all 2^32 inputs with 0 mismatches."""
    counts = silicon.verify(chip)
    section = silicon.entry(chip)
    assert counts["vector outputs"] > 100_000
    assert set(section["sweeps"]) == set(probe.SWEEPS) == set(capture.EXPECTED)
    assert set(section["wgmma"]) == set(tiles.FAMILIES)
    assert set(section["fma"]) == set(triples.FAMILIES)
    assert sum(run["outputs"] for run in section["wgmma"].values()) > 100_000_000
    widths = {group["n"] for group in section["vectors"]["groups"].values()}
    assert widths == {8, 64, 128, 256}
    assert {name: section["tables"][name]["sha256"] for name in tables.NAMES} == TABLE_SHA256[chip]
    assert {name: table["sha256"] for name, table in tables.chips()[chip].items()} == TABLE_SHA256[chip]


@pytest.mark.parametrize("chip", silicon.chips())
def test_atoms_give_the_committed_vectors(chip: str) -> None:
    for vector in silicon.vectors(chip):
        model = capture.predict_wgmma(vector.a, vector.b, vector.c, vector.scale_d)
        wrong = int((model != vector.bits).sum())
        assert wrong == 0, f"{vector.name} of {chip}: {wrong} of {vector.bits.numel()} outputs differ"


class Double:
    """A chip that computes what the atoms say, with its own tables; `flip` turns a bit of one sweep's outputs."""

    def __init__(self, chip: str = "H199", flip: str = "") -> None:
        self.device = Device(-1, f"NVIDIA {chip}", chip, 132, "none")
        self.flip = flip
        self.tables = {name: torch.from_numpy(tables.correctly_rounded(name)) for name in tables.NAMES}

    def wgmma(self, a: Tensor, b: Tensor, c: Tensor, scale_d: bool, a_from: str) -> Tensor:
        return capture.predict_wgmma(a, b, c, scale_d)

    def sweep(self, name: str, start: int, count: int, inputs: Tensor | None = None) -> Tensor:
        if count == tables.SIZE:
            return self.tables[name]
        assert inputs is not None
        bits = capture.EXPECTED[name](inputs.view(torch.float32))
        bits = bits.view(torch.int16 if bits.element_size() == 2 else torch.int32)
        return bits ^ 1 if name == self.flip else bits

    def fma(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return atoms.fma(a, b, c).view(torch.int32)


def measure(chip: Double, text: io.StringIO) -> tuple[dict, dict[str, bytes]]:
    """A capture of two widths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "VECTOR_WIDTHS", {8: 1, 64: 1})
        patch.setattr(capture, "WIDTHS", (8, 64))
        return capture.measure(chip, TINY, {"date": "today"}, Console(file=text, width=200))


@pytest.fixture(scope="module")
def measured() -> tuple[dict, dict[str, bytes], str]:
    text = io.StringIO()
    return *measure(Double(), text), text.getvalue()


@pytest.fixture
def published(measured: tuple[dict, dict[str, bytes], str], tmp_path: Path) -> Path:
    section, files, _ = measured
    section = json.loads(json.dumps(section))
    for sweep in section["sweeps"].values():
        sweep["outputs"] = silicon.ALL_INPUTS
    silicon.publish(tmp_path, "H199", section, files)
    return tmp_path


def test_capture_measures_everything_and_restores_the_tables(measured: tuple[dict, dict[str, bytes], str]) -> None:
    section, _, text = measured
    assert set(section["sweeps"]) == set(probe.SWEEPS)
    assert all(sweep["outputs"] == TINY.inputs for sweep in section["sweeps"].values())
    assert "0 mismatches of" in text
    assert tables.load.__name__ == "load"


def test_published_capture_verifies(published: Path) -> None:
    assert silicon.verify("H199", published)["tables"] == 2
    assert {path.suffix for path in published.iterdir()} == {".safetensors", ".json"}, "no temporary file is left"


def test_what_the_atoms_read_is_what_was_captured(published: Path) -> None:
    """The list of tables is a second word on the captured bits; neither can drift alone, nor both from the data."""
    assert tables.chips().keys() == set(silicon.chips())
    listed = published / "tables.json"
    whole = listed.read_text()
    sha256 = tables.chips(published)["H199"]["ex2"]["sha256"]
    for other in ("{}", whole.replace(sha256, "0" * 64)):
        listed.write_text(other)
        with pytest.raises(silicon.SiliconError, match=r"table \w+ of H199: quant/chips/tables\.json and the manifest"):
            silicon.verify("H199", published)
    listed.write_text(whole.replace(sha256, "0" * 64))
    path = published / "manifest.json"
    path.write_text(path.read_text().replace(sha256, "0" * 64))
    with pytest.raises(silicon.SiliconError, match="table ex2 of H199 decodes to another sha256"):
        silicon.verify("H199", published)


def test_chips_with_the_same_bits_share_files(published: Path, measured: tuple[dict, dict[str, bytes], str]) -> None:
    before = {path.name for path in published.iterdir()}
    section, files, _ = measured
    silicon.publish(published, "H198", section, files)
    assert {path.name for path in published.iterdir()} == before
    assert silicon.chips(published) == ["H198", "H199"]


def test_files_that_no_chip_names_go(published: Path) -> None:
    section = silicon.entry("H199", published)
    old = published / section["tables"]["rcp"]["file"]
    files = {old.name: old.read_bytes(), "rcp-other.safetensors": old.read_bytes()}
    section["tables"]["rcp"]["file"] = "rcp-other.safetensors"
    silicon.publish(published, "H199", section, files)
    assert not old.exists()
    assert silicon.verify("H199", published)


def test_a_differing_chip_is_named_and_nothing_is_packed() -> None:
    text = io.StringIO()
    with pytest.raises(capture.ChipDiffers, match=r"H199 and quant/atoms\.py differ in silu_fast"):
        measure(Double(flip="silu_fast"), text)
    assert "silu_fast: input 0x00000000: chip 0x1, atoms 0x0" in text.getvalue()


@pytest.mark.parametrize("kind", ["rcp", "ex2", "wgmma"])
def test_damaged_or_missing_file_is_named(published: Path, kind: str) -> None:
    (path,) = published.glob(f"{kind}-*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(silicon.SiliconError, match=rf"{path.name} is damaged"):
        silicon.verify("H199", published)
    path.unlink()
    with pytest.raises(silicon.SiliconError, match=rf"{path.name} is missing"):
        silicon.verify("H199", published)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["sweeps"]["rcp"].update(mismatches=1), "sweep rcp"),
        (lambda s: s["sweeps"]["ex2"].update(outputs=1 << 31), "sweep ex2"),
        (lambda s: s["fma"]["near"].update(mismatches=3), "fma run near"),
        (lambda s: s["wgmma"]["chain"].update(outputs=0), "wgmma run chain"),
        (lambda s: s["tables"]["rcp"].update(sha256="0" * 64), "table rcp"),
        (lambda s: s["vectors"]["groups"]["chain.n8"].update(inputs_sha256="0" * 64), "chain.n8"),
        (lambda s: s["vectors"]["groups"].pop("chain.n8"), "groups"),
    ],
    ids=["mismatch", "inputs", "fma", "wgmma", "table", "drawn", "groups"],
)
def test_manifest_that_says_too_little_is_refused(
    published: Path, change: Callable[[dict], object], message: str
) -> None:
    path = published / "manifest.json"
    content = json.loads(path.read_text())
    change(content["chips"]["H199"])
    path.write_text(json.dumps(content))
    with pytest.raises(silicon.SiliconError, match=message):
        silicon.verify("H199", published)


def test_damaged_manifest_and_unmeasured_chip(tmp_path: Path) -> None:
    with pytest.raises(silicon.SiliconError, match=r"H20: unmeasured .*python -m golden capture"):
        silicon.entry("H20", tmp_path)
    (tmp_path / "manifest.json").write_text('{"chips": [')
    with pytest.raises(silicon.SiliconError, match=r"manifest\.json .* is damaged"):
        silicon.chips(tmp_path)


def test_digest_is_what_its_definition_says() -> None:
    """Against whole integers; the order of the outputs matters, and so does each of them."""
    words = [5, 0, 0xFFFFFFFF, 7]
    sums = [sum((w + 1) * factor**j for j, w in enumerate(words)) % (1 << 64) for factor in silicon.DIGEST_FACTORS]
    digest = silicon.Digest()
    digest.update(torch.tensor([5, 0, -1, 7], dtype=torch.int32))
    assert digest.hexdigest() == hashlib.sha256(b"".join(s.to_bytes(8, "little") for s in sums)).hexdigest()


def test_families_aim_where_they_say() -> None:
    def draw(family: str) -> tuple[Tensor, Tensor, Tensor]:
        return tiles.tiles(family, 64, 8)

    a, b, _ = draw("nan_codes")
    assert a.unique().numel() == b.unique().numel() == 256
    a, _, c = draw("numbers")
    assert a.unique().numel() == 254
    assert not torch.isnan(c).any()
    assert torch.isnan(draw("wide_c")[2]).any()
    assert (draw("subnormal_c")[2].abs() < 2.0**-126).all()
    assert {int(v) & 0xFFFFFFFF for v in draw("special_c")[2].view(torch.int32).unique()} == set(tiles.SPECIAL)
    a, b, c = draw("cancel")
    model = capture.predict_wgmma(a, b, c, True)
    assert (model == c.view(torch.int32)).any() or (model == 0).any()


@pytest.mark.gpu
def test_a_short_capture_of_this_chip_repeats() -> None:
    """The chip at hand still computes what the atoms predict, and its tables and vectors are the committed ones."""
    chip = probe.Probes()
    name = chip.device.chip
    if name not in silicon.chips():
        pytest.skip(silicon.unmeasured(name))
    section, _ = capture.measure(chip, capture.QUICK, capture.versions(chip.built), Console())
    stored = silicon.entry(name)
    for part in ("rcp", "ex2"):
        assert section["tables"][part] == stored["tables"][part]
    assert section["vectors"] == stored["vectors"]


@pytest.mark.gpu
@pytest.mark.parametrize("a_from", list(probe.A_SOURCES))
def test_every_width_and_chain_length(a_from: str) -> None:
    """1 to 7 steps, so that chains in flight and single steps meet; shared memory beyond the static limit."""
    chip = probe.Probes()
    for n in probe.WIDTHS:
        a, b, c = tiles.tiles("long", n, 2, device=f"cuda:{chip.device.index}")
        for steps in (1, 2, 3, 4, 5, 7, 16):
            part = (a[..., : 32 * steps].contiguous(), b[..., : 32 * steps].contiguous(), c)
            for scale_d in (False, True):
                assert torch.equal(chip.wgmma(*part, scale_d, a_from), capture.predict_wgmma(*part, scale_d))
