"""What was measured on chips: special-function tables, tensor-core vectors and sweeps, by chip, read and verified.

golden/silicon/manifest.json holds `chips`: chip -> device, versions, date, tables, vectors, sweeps, wgmma. Data files
carry a part of their sha256 in their name, and chips with the same bits share them. The files of the tables lie in
quant/chips, where the atoms read them, with a list of their own; `verify` holds it to the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from megaproof.golden import folders, tiles, untrusted
from megaproof.golden.errors import GoldenError
from megaproof.quant import tables
from megaproof.quant.host_state import guarded
from megaproof.toolchain.errors import escaped

FOLDER = Path(__file__).resolve().parent / "silicon"
ALL_INPUTS = 1 << 32
DIGEST_BLOCK = 1 << 20
DIGEST_FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)


class SiliconError(GoldenError):
    """A capture that is missing, damaged or does not say what it must; the message names file and rule."""


@dataclass(frozen=True)
class Vector:
    """One captured group of tensor-core tiles: operands, accumulators, the chip's output bits int32 [cases, 64, N]."""

    name: str
    a: Tensor
    b: Tensor
    c: Tensor
    scale_d: bool
    bits: Tensor


def tables_folder(folder: Path) -> Path:
    """Where the tables of the captures in `folder` are: in quant/chips; those of captures elsewhere lie beside them."""
    return tables.FOLDER if folder.resolve() == FOLDER else folder


def manifest(folder: Path = FOLDER) -> dict[str, Any]:
    """The manifest; {'chips': {}} where nothing was captured yet. Raises SiliconError when it cannot be read."""
    path = folder / "manifest.json"
    if not path.exists():
        return {"chips": {}}
    try:
        content = untrusted.parsed(untrusted.read(path, untrusted.MANIFEST_BYTES))
        found = untrusted.checked("the manifest", content, {"chips": lambda value: isinstance(value, dict)})["chips"]
        for chip, section in found.items():
            _check_section(chip, section)
    except (GoldenError, ValueError) as error:
        raise SiliconError(f"{path.name} of golden/silicon is damaged ({error}): restore it from git") from error
    return content


def _check_section(chip: str, section: Any) -> None:
    """Raises ValueError unless the section of a chip is whole, so that nothing behind it has to ask."""
    sha256, count = untrusted.is_sha256, untrusted.is_count
    of = f"of {escaped(chip)}"
    file = {"file": folders.is_data_file, "file_sha256": sha256}
    run = {"outputs": count, "mismatches": count, "digest": sha256}
    group = {
        "family": lambda value: isinstance(value, str) and value in tiles.FAMILIES,
        "n": lambda value: count(value, 257) and value > 0 and value % 8 == 0,
        "cases": lambda value: count(value, 65) and value > 0,
        "inputs_sha256": sha256,
    }
    parts = ("tables", "vectors", "wgmma", "fma", "sweeps")
    untrusted.checked(f"the section {of}", section, dict.fromkeys(parts, lambda value: isinstance(value, dict)))
    untrusted.checked(f"tables {of}", section["tables"], dict.fromkeys(tables.NAMES, lambda value: True))
    for name, table in section["tables"].items():
        untrusted.checked(f"table {name} {of}", table, {**file, "sha256": sha256})
    untrusted.checked(f"vectors {of}", section["vectors"], {**file, "groups": lambda value: isinstance(value, dict)})
    for name, drawn in section["vectors"]["groups"].items():
        untrusted.checked(f"vectors {name} {of}", drawn, group)
    for kind in ("wgmma", "fma", "sweeps"):
        for name, result in section[kind].items():
            untrusted.checked(f"{kind} {name} {of}", result, run)


def chips(folder: Path = FOLDER) -> list[str]:
    """The chips that were captured."""
    return list(manifest(folder)["chips"])


def unmeasured(chip: str) -> str:
    """What to say of a chip without a capture: its results are bounded, not proven, until it is captured."""
    known = ", ".join(chips()) or "none"
    return f"{chip}: unmeasured (measured: {known}); run `python -m golden capture` on a machine with this chip"


def entry(chip: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The manifest's section of a chip. Raises SiliconError when it is unmeasured."""
    content = manifest(folder)["chips"]
    if chip not in content:
        raise SiliconError(unmeasured(chip))
    return content[chip]


def vectors(chip: str, folder: Path = FOLDER, device: torch.device | str = "cpu") -> Iterator[Vector]:
    """The committed tensor-core vectors of a chip, inputs drawn anew and checked. Raises SiliconError."""
    section = entry(chip, folder)["vectors"]
    outputs = _read(folder / section["file"], section["file_sha256"])
    if set(outputs) != set(section["groups"]):
        raise SiliconError(f"golden/silicon/{section['file']}: its groups are not those of the manifest")
    for name, group in section["groups"].items():
        a, b, c = tiles.tiles(group["family"], group["n"], group["cases"])
        if tiles.input_digest(a, b, c) != group["inputs_sha256"]:
            raise SiliconError(f"vectors {name} of {chip}: the generator gives other inputs than those captured")
        bits = outputs[name]
        if bits.dtype != torch.int32 or bits.shape != c.shape:
            raise SiliconError(f"golden/silicon/{section['file']}: {name} must be int32 of shape {tuple(c.shape)}")
        scale_d = tiles.FAMILIES[group["family"]].scale_d
        yield Vector(name, a.to(device), b.to(device), c.to(device), scale_d, bits.to(device))


@guarded
def verify(chip: str, folder: Path = FOLDER) -> dict[str, int]:
    """Checks every file and figure of a capture; counts what was checked. Raises SiliconError at the first fault."""
    section = entry(chip, folder)
    listed = tables.chips(tables_folder(folder)).get(chip, {})
    for name in tables.NAMES:
        table = section["tables"][name]
        if listed.get(name) != _listed(table):
            raise SiliconError(f"table {name} of {chip}: quant/chips/tables.json and the manifest name different bits")
        blob = _read(tables_folder(folder) / table["file"], table["file_sha256"])[name].numpy()
        if tables.digest(tables.decode_table(name, blob)) != table["sha256"]:
            raise SiliconError(f"quant/chips/{table['file']}: table {name} of {chip} decodes to another sha256")
    outputs = sum(vector.bits.numel() for vector in vectors(chip, folder))
    for name, sweep in section["sweeps"].items():
        if sweep["mismatches"] != 0 or sweep["outputs"] != ALL_INPUTS:
            raise SiliconError(f"sweep {name} of {chip}: must be 0 mismatches of {ALL_INPUTS} inputs, is {sweep}")
    for kind in ("wgmma", "fma"):
        for name, run in section[kind].items():
            if run["mismatches"] != 0 or run["outputs"] <= 0:
                raise SiliconError(
                    f"{kind} run {name} of {chip}: must be 0 mismatches of at least one output, is {run}"
                )
    return {"tables": len(tables.NAMES), "vector outputs": outputs, "sweeps": len(section["sweeps"])}


def check_folder(out_dir: Path = FOLDER) -> None:
    """Raises GoldenError where a capture can't be written, since a file is there that is not of the captures."""
    names = {path.name for path in _files(out_dir, manifest(out_dir))} | {"manifest.json", "tables.json"}
    for folder in {out_dir, tables_folder(out_dir)}:
        folders.refuse_foreign(folder, names, out_dir)


def _files(out_dir: Path, content: dict[str, Any]) -> set[Path]:
    """The data files that a manifest names."""
    found = set()
    for section in content["chips"].values():
        found.add(out_dir / section["vectors"]["file"])
        found.update(tables_folder(out_dir) / table["file"] for table in section["tables"].values())
    return found


def publish(out_dir: Path, chip: str, section: dict[str, Any], files: dict[str, bytes]) -> None:
    """Stores a section under the folder's lock: data files first, under names that hold their sha256, then the list
    of tables and the manifest, then files that only the manifest before named go.

    Each file is written beside and renamed: a reader sees the old capture or the new one, whole. Raises GoldenError
    where the folder holds a foreign file, another process writes it, or it can't be written.
    """
    with folders.one_writer(out_dir):
        check_folder(out_dir)
        content = manifest(out_dir)
        before = _files(out_dir, content)
        content["chips"][chip] = section
        content["chips"] = dict(sorted(content["chips"].items()))
        tables_dir, of_tables = tables_folder(out_dir), {table["file"] for table in section["tables"].values()}
        data = {(tables_dir if name in of_tables else out_dir) / name: blob for name, blob in files.items()}
        listed = {c: {name: _listed(t) for name, t in s["tables"].items()} for c, s in content["chips"].items()}
        lists = {
            tables_dir / "tables.json": (json.dumps(listed, indent=1) + "\n").encode(),
            out_dir / "manifest.json": (json.dumps(content, indent=1) + "\n").encode(),
        }
        folders.write(out_dir, data, lists, before, {path.name for path in _files(out_dir, content)})


def _listed(table: dict[str, str]) -> dict[str, str]:
    """What tables.json says of a table of the manifest."""
    return {"file": table["file"], "sha256": table["sha256"]}


def pack(files: dict[str, bytes], name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Adds a data file, named after its content, to `files`; returns its name and sha256 for the manifest."""
    data = save(tensors)
    sha256 = hashlib.sha256(data).hexdigest()
    file = f"{name}-{sha256[:12]}.safetensors"
    files[file] = data
    return {"file": file, "file_sha256": sha256}


class Digest:
    """sha256 over 128-bit block digests made on the device, so that 2^32 outputs need not reach the host.

    The outputs, as unsigned integers w_0, w_1, ..., are cut into blocks of 2^20 (the last one of an update may be
    shorter). A block's digest is the two sums of (w_j + 1) * P^j mod 2^64, j from 0 within the block, for the two
    factors P; the sha256 takes the sums of all blocks, little-endian, in order.
    """

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._powers: Tensor | None = None

    def update(self, bits: Tensor) -> None:
        """int32 or int16 output bits; every update starts a new block."""
        if self._powers is None:
            self._powers = torch.from_numpy(digest_powers()).to(bits.device)
        mask = 0xFFFFFFFF if bits.dtype == torch.int32 else 0xFFFF
        words = (bits.reshape(-1).to(torch.int64) & mask) + 1
        words = torch.nn.functional.pad(words, (0, -words.numel() % DIGEST_BLOCK)).view(-1, DIGEST_BLOCK)
        sums = torch.stack([(words * powers).sum(1) for powers in self._powers], dim=1)  # int64 wraps mod 2^64
        self._sha.update(sums.cpu().numpy().astype("<i8").tobytes())

    def hexdigest(self) -> str:
        return self._sha.hexdigest()


def digest_powers() -> np.ndarray:
    """int64 [2, 2^20]: P^j mod 2^64 for both factors, by doubling."""
    out = np.empty((len(DIGEST_FACTORS), DIGEST_BLOCK), dtype=np.uint64)
    for row, factor in zip(out, DIGEST_FACTORS, strict=True):
        row[0], step, filled = 1, factor, 1
        while filled < DIGEST_BLOCK:
            row[filled : 2 * filled] = row[:filled] * np.uint64(step)
            step, filled = step * step % (1 << 64), 2 * filled
    return out.view(np.int64)


def _read(path: Path, sha256: str) -> dict[str, Tensor]:
    name = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise SiliconError(f"{name} is missing, but the manifest names it: restore it from git")
    try:
        blob = untrusted.read(path, untrusted.DATA_BYTES)
        if hashlib.sha256(blob).hexdigest() != sha256:
            raise SiliconError(f"{name} is damaged: its sha256 is not the manifest's")
        return untrusted.tensors(name, blob)
    except GoldenError as error:
        raise SiliconError(str(error)) from error
