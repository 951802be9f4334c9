"""Goldens that anybody may have written: whatever is damaged is one line, and sizes are known before memory is."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from megaproof.golden import silicon, store, untrusted
from megaproof.golden.errors import GoldenError
from megaproof.tests.support.made_goldens import CASES, made

GOLDEN = made("a reason")[CASES[0].id]
BLOB = save(GOLDEN.data)
CASE = CASES[0]


def planted(folder: Path, blob: bytes, **changes: Any) -> None:
    """A set of one case whose manifest vouches for a data file, whatever is in it."""
    sha256 = hashlib.sha256(blob).hexdigest()
    entry = {**GOLDEN.entry, "file": f"{sha256[:16]}.safetensors", "file_sha256": sha256} | changes
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / f"{sha256[:16]}.safetensors").write_bytes(blob)
    (folder / "manifest.json").write_text(json.dumps({"cases": {CASE.id: entry}}))


class OneLine(Exception):
    """A GoldenError that can be printed as it is."""


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Lets errors through, but turns a GoldenError of one line into OneLine."""
    try:
        yield
    except GoldenError as error:
        raise (OneLine if str(error).isprintable() else AssertionError)(str(error)) from error


def refused(act: Callable[[], object]) -> None:
    with pytest.raises(OneLine) as caught, one_line():
        act()
    assert len(str(caught.value)) < 1000


def file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ONE = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
BAD_FILES = {
    "empty": b"",
    "short": b"\x01",
    "huge header": b"\xff" * 8 + b"{}",
    "header beyond the file": (1 << 15).to_bytes(8, "little") + b"{}",
    "no json": file(b"{"),
    "no utf-8": file(b'{"\xff": 1}'),
    "deep": file(b"[" * 30000),
    "list": file([]),
    "twice": file(b'{"y": 1, "y": 1}'),
    "NaN": file(b'{"y": NaN}'),
    "1e999": file(b'{"y": 1e999}'),
    "control": file({"\x1b[31m": ONE}, b"1234"),
    "another dtype": file({"y": {**ONE, "dtype": "F64"}}, b"1234"),
    "dtype a list": file({"y": {**ONE, "dtype": []}}, b"1234"),
    "negative": file({"y": {**ONE, "shape": [-4]}}, b"1234"),
    "bool": file({"y": {**ONE, "shape": [True, 4]}}, b"1234"),
    "large and empty": file({"y": {**ONE, "shape": [1 << 62, 0], "data_offsets": [0, 0]}}),
    "larger than the file": file({"y": {**ONE, "shape": [1 << 30], "data_offsets": [0, 1 << 30]}}, b"1234"),
    "shape": file({"y": {**ONE, "shape": [5]}}, b"1234"),
    "no shape": file({"y": {"dtype": "U8", "data_offsets": [0, 4]}}, b"1234"),
    "hole": file({"y": {**ONE, "data_offsets": [1, 5]}}, b"12345"),
    "overlap": file({"x": ONE, "y": ONE}, b"1234"),
    "rest": file({"y": ONE}, b"12345"),
}


@pytest.mark.parametrize("blob", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_data_file_is_one_line(blob: bytes, tmp_path: Path) -> None:
    refused(lambda: untrusted.tensors("a file", blob))
    planted(tmp_path, blob)
    refused(lambda: store.read(CASE, tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data | {"y": data["y"][:-1].clone()},
        lambda data: data | {"y": data["y"].view(torch.int16)},
        lambda data: data | {"y": torch.zeros(1 << 20, dtype=torch.bfloat16)},
        lambda data: data | {"slots": data["slots"].repeat(99, 1)},
        lambda data: data | {"stats": data["stats"].repeat(2)},
        lambda data: data | {"more": data["y"].clone()},
        lambda data: {name: data[name] for name in data if name != "y"},
    ],
    ids=["rows", "dtype", "vector", "slots", "experts", "extra", "missing"],
)
def test_tensors_that_cannot_be_the_cases_are_refused(tmp_path: Path, change: Callable[[dict], dict]) -> None:
    planted(tmp_path, save(change(GOLDEN.data)))
    refused(lambda: store.read(CASE, tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../../../etc/passwd"},
        {"file": "model.safetensors"},
        {"file": "0123456789abcdef.safetensors"},
        {"file": 5},
        {"file_sha256": "x"},
        {"recipe": []},
        {"recipe": {"clamp": {"deep": []}}},
        {"recipe_id": None},
        {"seed": -1},
        {"seed": 1.5},
        {"seed": 1 << 64},
        {"stages": {}},
        {"stages": {"y": 1}},
        {"stages": None},
        {"data": "else"},
        {"data": []},
        {"reason": "\x1b]0;title\x07"},
        {"reason": "\u202e"},
        {"producer": 1},
        {"versions": "1"},
    ],
    ids=str,
)
def test_a_bad_entry_is_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    changes = change if "recipe" not in change else {**change, "recipe_id": "0" * 64}
    planted(tmp_path, BLOB, **changes)
    refused(lambda: store.read(CASE, tmp_path))


@pytest.mark.parametrize(
    "text",
    [b"\xff", b"[]", b"5", b"[" * 100000, b'{"cases": []}', b'{"cases": {"a": 1}}', b'{"cases": {}, "cases": {}}', b""],
    ids=["utf-8", "list", "number", "deep", "no-cases", "entry", "twice", "empty"],
)
def test_a_bad_manifest_is_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    for read in (store.read_manifest, silicon.chips):
        refused(lambda read=read: read(tmp_path))


def test_a_manifest_or_a_file_of_any_size_is_not_read(tmp_path: Path) -> None:
    planted(tmp_path, BLOB)
    for path in ((tmp_path / "manifest.json"), next((tmp_path / "data").iterdir())):
        with path.open("ab") as opened:
            opened.truncate(1 << 40)
        refused(lambda: store.read(CASE, tmp_path))
        planted(tmp_path, BLOB)


@settings(max_examples=60)
@given(place=st.integers(0, 1 << 20), value=st.integers(1, 255), cut=st.integers(0, 1 << 20), what=st.booleans())
def test_flips_and_cuts_of_a_data_file(place: int, value: int, cut: int, what: bool) -> None:
    size = int.from_bytes(BLOB[:8], "little") + 8  # the header, where a flip can do harm
    blob = bytearray(BLOB)
    if what:
        blob[place % size] ^= value
    else:
        del blob[cut % len(blob) :]
    with contextlib.suppress(OneLine), one_line():
        found = untrusted.tensors("a file", bytes(blob))
        assert sum(tensor.numel() * tensor.element_size() for tensor in found.values()) < len(BLOB)


@settings(max_examples=60)
@given(place=st.integers(0, 1 << 20), value=st.integers(1, 255))
def test_flips_of_the_manifest_of_a_chip(place: int, value: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = bytearray((silicon.FOLDER / "manifest.json").read_bytes())
    text[place % len(text)] ^= value
    folder = tmp_path_factory.getbasetemp() / "flips"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(text)
    with contextlib.suppress(OneLine), one_line():
        for chip in silicon.chips(folder):
            silicon.verify(chip, folder)
