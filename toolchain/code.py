"""The code digest of a kernel: what it is for the chip, whatever its sources call things.

A sha256 for each entry of a cubin, over its instructions and its constants, with the registers, the stack, the spills
and the static shared memory of ptxas' report. Comments, names, files and lines are no part of it, and neither is the
table of symbols: NVRTC keeps every constant of a namespace, used or not, in an order that follows the names.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from megaproof.toolchain.build import Report

INSTRUCTION = 16
"""Bytes of an instruction of sm_90a."""
SHARED_BANKS = {3, 4}
"""Banks that the kernels of a cubin share: variables in constant memory, addresses of those in global memory."""
_RELA, _NO_BITS = 4, 8
"""Types of sections: relocations with addends; a size without bytes."""
_KIND = re.compile(r"\.text|\.nv\.constant\d+|\.nv\.global(?:\.init)?")
"""How the name of a section with code or data begins; behind it the function's name may stand."""


@dataclass(frozen=True)
class _Section:
    name: str
    type: int
    size: int
    data: bytes
    link: int
    """Number of another section: of relocations, their symbols; of symbols, their names."""
    info: int
    """Of relocations: number of the section that they change."""

    @property
    def kind(self) -> str:
        match = _KIND.match(self.name)
        return match[0] if match else self.name


def code_digests(cubin: bytes, report: Report) -> dict[str, str]:
    """Entry -> code digest, for the entries of the report. Raises ValueError where the cubin has no code of one."""
    sections = _sections(cubin)
    functions = {section.name.removeprefix(".text.") for section in sections if section.kind == ".text"}
    if missing := sorted(report.entries.keys() - functions):
        raise ValueError(f"the cubin has no code of {', '.join(missing)}")
    others = [_function(sections, name) for name in functions - report.entries.keys()]
    # Any kernel may call a function that has a section of its own; neither its name nor its place says anything.
    called = sorted(_content(sections, other) for other in others)
    digests = {}
    for entry, e in report.entries.items():
        own = _function(sections, entry)
        figures = struct.pack("<5Q", e.registers, e.stack, e.spill_stores, e.spill_loads, e.shared)
        parts = [figures, _content(sections, own), *called]
        if any(_reads_data(sections, section) for function in (own, *others) for section in function):
            # Instructions hold places, not names: all shared data counts, where it lies.
            data = [section for section in sections if section.kind == section.name and _KIND.match(section.name)]
            parts.append(_content(sections, sorted(data, key=lambda section: section.name)))
        digests[entry] = hashlib.sha256(_framed(parts)).hexdigest()
    return digests


def shared_banks(text: bytes) -> set[int]:
    """Those of SHARED_BANKS that instructions read. One with an operand in a bank has form 3 or 5, bits 9 to 11."""
    words = [word for word, _ in struct.iter_unpack("<QQ", text)]
    return {word >> 54 & 31 for word in words if word >> 9 & 7 in (3, 5)} & SHARED_BANKS


def texts(cubin: bytes) -> list[bytes]:
    """The instructions of each function that has a section of its own. Raises ValueError."""
    return [section.data for section in _sections(cubin) if section.kind == ".text"]


def _reads_data(sections: list[_Section], section: _Section) -> bool:
    return bool(section.kind == ".text" and shared_banks(section.data)) or bool(_relocations(sections, section))


def _function(sections: list[_Section], name: str) -> list[_Section]:
    """Its instructions, and the banks that are its own, as bank 0: a kernel's parameters."""
    found = [section for section in sections if section.name == f"{section.kind}.{name}"]
    return sorted(found, key=lambda section: section.kind)


def _content(sections: list[_Section], chosen: Iterable[_Section]) -> bytes:
    """Kind, size, bytes and relocations of sections: nothing that the sources have named."""
    parts = []
    for section in chosen:
        relocations = _framed(_relocations(sections, section))
        parts += [section.kind.encode(), struct.pack("<Q", section.size), section.data, relocations]
    return _framed(parts)


def _relocations(sections: list[_Section], changed: _Section) -> list[bytes]:
    """What is written into a section when it is loaded, by place: the place, the way, and what stands for a name."""
    found = []
    for table in sections:
        if table.type != _RELA or sections[table.info] is not changed:
            continue
        symbols = sections[table.link]
        for place, info, addend in struct.iter_unpack("<QQq", table.data):
            name, _, _, home, value, size = struct.unpack_from("<IBBHQQ", symbols.data, 24 * (info >> 32))
            if 0 < home < len(sections):
                target = sections[home]
                what = target.kind.encode() + (target.data if target.kind == ".text" else b"")
            else:  # of the driver or the linker, such as vprintf: they know it by its name
                what = _string(sections[symbols.link].data, name)
            how = struct.pack("<QQqQQ", place, info & 0xFFFFFFFF, addend, value, size)
            found.append(how + hashlib.sha256(what).digest())
    return sorted(found)


def _sections(cubin: bytes) -> list[_Section]:
    """Those of a little-endian ELF file of 64 bits."""
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise ValueError("the cubin is no little-endian ELF file of 64 bits")
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry_size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + number * entry_size) for number in range(count)]
    strings = cubin[headers[names][4] :]
    sections = []
    for name, kind, _, _, offset, size, link, info, _, _ in headers:
        data = b"" if kind == _NO_BITS else cubin[offset : offset + size]
        sections.append(_Section(_string(strings, name).decode(), kind, size, data, link, info))
    return sections


def _string(table: bytes, place: int) -> bytes:
    return table[place : table.index(b"\0", place)]


def _framed(parts: Iterable[bytes]) -> bytes:
    """Each with its length before it: other parts never give the same bytes."""
    return b"".join(struct.pack("<Q", len(part)) + part for part in parts)
