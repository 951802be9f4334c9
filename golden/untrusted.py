"""Files that anybody may have written, read without trust: sizes are known before anything is made of them.

Whatever is wrong is a GoldenError of one line. Text that a terminal would obey is refused here, so that what is read
can be printed.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaproof.golden.errors import GoldenError
from megaproof.toolchain.errors import escaped

MANIFEST_BYTES = 1 << 23
"""Bytes of the largest manifest; that of 65 cases has 200,000."""
DATA_BYTES = 1 << 24
"""Bytes of the largest data file; the vectors of a chip have 1.6 million."""
HEADER_BYTES = 1 << 16
"""Bytes of the largest header of a data file."""
DEPTH = 16
"""How deep values of a manifest may lie in each other."""
DTYPES = {
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
}
"""The dtypes that data files hold, by safetensors' names."""
SHA256 = re.compile(r"[0-9a-f]{64}")


def read(path: Path, most: int) -> bytes:
    """The bytes of a file of at most `most` bytes. Raises GoldenError; a pipe does not block."""
    name = f"{escaped(path.parent.name)}/{escaped(path.name)}"
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise GoldenError(f"{name} is damaged: it is no file; restore it")
            if found.st_size > most:
                raise GoldenError(f"{name} is damaged: {found.st_size} bytes, {most} at most; restore it")
            return file.read(most)
    except FileNotFoundError:
        raise GoldenError(f"{name} is missing: restore it") from None
    except (OSError, ValueError) as error:
        raise GoldenError(f"{name} can't be read: {escaped(getattr(error, 'strerror', None) or error)}") from error


def parsed(text: bytes) -> Any:
    """A JSON value: UTF-8, finite numbers, no key twice, printable strings, DEPTH levels. Raises ValueError."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"values lie deeper than {DEPTH} levels in each other") from None
    _check(value, DEPTH)
    return value


def checked(what: str, value: Any, rules: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
    """An object that has these keys, with values that their rules accept; others may be there. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no object")
    for key, holds in rules.items():
        if key not in value:
            raise ValueError(f"{what} has no {key}")
        if not holds(value[key]):
            raise ValueError(f"{key} of {what} is {escaped(repr(value[key]), 60)}")
    return value


def is_sha256(value: Any) -> bool:
    """Whether a value is a sha256 in hex."""
    return isinstance(value, str) and SHA256.fullmatch(value) is not None


def is_count(value: Any, most: int = 1 << 63) -> bool:
    """Whether a value is a whole number from 0 to most - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < most


def tensors(name: str, blob: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of which every byte is accounted for. Raises GoldenError that names the file.

    They are copies, of one to three dimensions and of DTYPES.
    """
    try:
        return _tensors(blob)
    except (ValueError, RuntimeError) as error:
        raise GoldenError(f"{escaped(name)} is damaged ({error}): restore it") from error


def _tensors(blob: bytes) -> dict[str, Tensor]:
    size = int.from_bytes(blob[:8], "little")
    if len(blob) < 8 or size > min(HEADER_BYTES, len(blob) - 8):
        raise ValueError(f"a header of {size} bytes in a file of {len(blob)}")
    header, data, found, end = parsed(blob[8 : 8 + size]), bytearray(blob[8 + size :]), {}, 0
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    rules: dict[str, Callable[[Any], bool]] = {
        "dtype": lambda value: isinstance(value, str) and value in DTYPES,
        "shape": lambda value: _is_list(value) and 1 <= len(value) <= 3,
        "data_offsets": lambda value: _is_list(value) and len(value) == 2,
    }
    entries = {name: checked(f"tensor {name}", entry, rules) for name, entry in header.items()}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if begin != end or stop - begin != math.prod(shape) * dtype.itemsize or stop > len(data):
            raise ValueError(f"tensor {name} of shape {shape} lies at {begin} to {stop}")
        flat = torch.frombuffer(data, dtype=torch.uint8, count=stop - begin, offset=begin) if stop > begin else None
        found[name] = torch.empty(shape, dtype=dtype) if flat is None else flat.clone().view(dtype).view(shape)
        end = stop
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes behind the last tensor")
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(is_count(number, 1 << 31) for number in value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{escaped(text, 40)} is no finite number")
    return value


def _check(value: Any, depth: int) -> None:
    if depth == 0:
        raise ValueError(f"values lie deeper than {DEPTH} levels in each other")
    if isinstance(value, str) and not value.isprintable():
        raise ValueError(f"a string has characters that can't be printed: {escaped(value, 40)}")
    if isinstance(value, dict | list):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            _check(part, depth - 1)
