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
from safetensors.torch import load_file, save
from torch import Tensor

from megaproof.golden import tiles
from megaproof.quant import tables
from megaproof.quant.host_state import guarded
from megaproof.toolchain.files import replace

FOLDER = Path(__file__).resolve().parent / "silicon"
ALL_INPUTS = 1 << 32
DIGEST_BLOCK = 1 << 20
DIGEST_FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)


class SiliconError(RuntimeError):
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
    return tables.FOLDER if folder == FOLDER else folder


def manifest(folder: Path = FOLDER) -> dict[str, Any]:
    """The manifest; {'chips': {}} where nothing was captured yet. Raises SiliconError when it cannot be read."""
    path = folder / "manifest.json"
    if not path.exists():
        return {"chips": {}}
    try:
        content = json.loads(path.read_text())
        if not isinstance(content["chips"], dict):
            raise TypeError("'chips' is no table")
    except (ValueError, KeyError, TypeError) as error:
        raise SiliconError(f"{path.name} of golden/silicon is damaged ({error}): restore it from git") from error
    return content


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


def publish(out_dir: Path, chip: str, section: dict[str, Any], files: dict[str, bytes]) -> None:
    """Stores a section: data files first, under names that hold their sha256, then the list of tables and the
    manifest, then old files go.

    Each file is written beside and renamed: a reader sees the old capture or the new one, whole.
    """
    content = manifest(out_dir)
    content["chips"][chip] = section
    content["chips"] = dict(sorted(content["chips"].items()))
    out_dir.mkdir(parents=True, exist_ok=True)
    tables_dir, of_tables = tables_folder(out_dir), {table["file"] for table in section["tables"].values()}
    for name, data in files.items():
        replace((tables_dir if name in of_tables else out_dir) / name, data)
    listed = {c: {name: _listed(t) for name, t in s["tables"].items()} for c, s in content["chips"].items()}
    replace(tables_dir / "tables.json", (json.dumps(listed, indent=1) + "\n").encode())
    replace(out_dir / "manifest.json", (json.dumps(content, indent=1) + "\n").encode())
    named = {part["file"] for s in content["chips"].values() for part in (*s["tables"].values(), s["vectors"])}
    for path in (*out_dir.glob("*.safetensors"), *tables_dir.glob("*.safetensors")):
        if path.name not in named:
            path.unlink(missing_ok=True)


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


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read(path: Path, sha256: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise SiliconError(f"{path.parent.name}/{path.name} is missing, but the manifest names it: restore it from git")
    if file_digest(path) != sha256:
        raise SiliconError(f"{path.parent.name}/{path.name} is damaged: its sha256 is not the manifest's")
    return load_file(path)
