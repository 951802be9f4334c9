"""The special-function tables of a chip, packed: the chip's results as differences to the correctly rounded values.

`rcp.approx` over [1, 2) and `ex2.approx` over [0, 1) take 2^23 inputs each. The chip is within one unit in the last
place of the correctly rounded value, so a table is stored as the positions where it differs, and rebuilt on a base made
by integer arithmetic alone: no libm can change a bit. `quant/chips/tables.json` names the file of each chip's tables,
which chips with the same bits share, and pins the sha256 of each table; `python -m golden capture` writes both.
"""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

SIZE = 1 << 23
NAMES = ("rcp", "ex2")
DEFAULT_CHIP = "H200"
FOLDER = Path(__file__).resolve().parent / "chips"
"""tables.json, and the data files that it names."""


class TableError(RuntimeError):
    """A table that is missing, damaged or of an unmeasured chip; the message says which and what to do."""


def correctly_rounded(name: str) -> np.ndarray:
    """int32 [2^23]: fp32 bits of the correctly rounded 1/(1 + i/2^23) ('rcp') or 2^(i/2^23) ('ex2')."""
    if name == "rcp":
        significand = np.arange(SIZE, 2 * SIZE, dtype=np.int64)
        # IEEE division in float64 then to float32 rounds once in effect: 53 >= 2 * 24 + 2 bits.
        return (float(SIZE) / significand.astype(np.float64)).astype(np.float32).view(np.int32)
    if name == "ex2":
        return _exp2_rounded()
    raise TableError(f"table name {name!r} is unknown; known: {', '.join(NAMES)}")


def _exp2_rounded() -> np.ndarray:
    """2^(i/2^23) = 2^(high/2^12) * 2^(low/2^23), both factors integers of 62 fraction bits from exact square roots."""
    high, low = _roots_of_two(12, 12), _roots_of_two(23, 11)
    out = np.empty(SIZE, dtype=np.int32)
    low_top, low_bottom = low >> np.uint64(31), low & np.uint64((1 << 31) - 1)
    for i, factor in enumerate(high):
        top, bottom = factor >> np.uint64(31), factor & np.uint64((1 << 31) - 1)
        # Product with 62 fraction bits; the dropped bottom * bottom >> 62 and the cuts cost under 2^-59.
        product = top * low_top + ((top * low_bottom + bottom * low_top) >> np.uint64(31))
        rounded = (product + np.uint64(1 << 38)) >> np.uint64(39)  # to 23 fraction bits
        out[i << 11 : (i + 1) << 11] = (rounded.astype(np.int64) - SIZE + (127 << 23)).astype(np.int32)
    return out


def _roots_of_two(depth: int, bits: int) -> np.ndarray:
    """uint64 [2^bits]: 2^(j / 2^depth) with 62 fraction bits, for j < 2^bits, by repeated integer square roots."""
    precision = 128
    root, roots = 2 << precision, []
    for _ in range(depth):
        root = math.isqrt(root << precision)
        roots.append(root)  # roots[d] = 2^(1 / 2^(d + 1))
    values = [1 << precision]
    for j in range(bits):  # bit j of the index weighs 2^(2^j / 2^depth)
        values += [v * roots[depth - 1 - j] >> precision for v in values]
    return np.array([v >> (precision - 62) for v in values], dtype=np.uint64)


def encode_table(name: str, bits: np.ndarray | Tensor) -> np.ndarray:
    """int32 [2^23] fp32 bit patterns of the chip -> uint8 blob. Raises TableError beyond one ulp of the base."""
    chip = np.asarray(bits, dtype=np.int64)
    delta = chip - correctly_rounded(name)
    if chip.shape != (SIZE,) or np.abs(delta).max() > 1:
        raise TableError(f"table {name}: every one of {SIZE} entries must be within one ulp of the rounded value")
    where = np.flatnonzero(delta)
    gaps = np.diff(where, prepend=-1).astype(np.int64)
    packed = (gaps << 1) | (delta[where] > 0)
    if packed.max(initial=0) >= 1 << 16:
        raise TableError(f"table {name}: a gap of {gaps.max()} entries does not fit 15 bits")
    planes = packed.astype("<u2").view(np.uint8).reshape(-1, 2).T
    return np.frombuffer(lzma.compress(planes.tobytes(), preset=9), dtype=np.uint8)


def decode_table(name: str, blob: np.ndarray) -> np.ndarray:
    """Inverse of `encode_table`: int32 [2^23]."""
    planes = np.frombuffer(lzma.decompress(blob.tobytes()), dtype=np.uint8).reshape(2, -1)
    packed = np.ascontiguousarray(planes.T).view("<u2").reshape(-1).astype(np.int64)
    out = correctly_rounded(name)
    out[np.cumsum(packed >> 1) - 1] += np.where(packed & 1, 1, -1).astype(np.int32)
    return out


def digest(bits: np.ndarray) -> str:
    """sha256 of a decoded table, as little-endian int32."""
    return hashlib.sha256(np.ascontiguousarray(bits, dtype="<i4").tobytes()).hexdigest()


def chips(folder: Path = FOLDER) -> dict[str, dict[str, dict[str, str]]]:
    """Chip -> table -> {file, sha256 of the decoded table}, of the chips that were measured; {} without the file."""
    path = folder / "tables.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@functools.cache
def _load(name: str, chip: str) -> np.ndarray:
    measured = chips()
    if not measured:
        raise TableError("quant/chips/tables.json is missing: restore it, or run `python -m golden capture`")
    if chip not in measured:
        known = ", ".join(measured)
        raise TableError(f"chip {chip!r} is unmeasured (measured: {known}); run `python -m golden capture` on it")
    entry = measured[chip][name]
    path = FOLDER / entry["file"]
    try:
        bits = decode_table(name, load_file(path)[name])
    except Exception as error:
        raise TableError(f"quant/chips/{entry['file']}: table {name} of {chip} cannot be read: {error}") from error
    if digest(bits) != entry["sha256"]:
        raise TableError(f"quant/chips/{entry['file']}: table {name} of {chip} is damaged: its sha256 is not pinned")
    return bits


@functools.cache
def _on(name: str, chip: str, device: torch.device) -> Tensor:
    return torch.from_numpy(_load(name, chip)).to(device)


def load(name: str, chip: str = DEFAULT_CHIP, device: torch.device | str = "cpu") -> Tensor:
    """int32 [2^23]: fp32 bits of the chip's 'rcp' or 'ex2' table. Raises TableError."""
    return _on(name, chip, torch.device(device))
