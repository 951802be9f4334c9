"""The parts of one output element, small enough to print: a k32 step term by term, a promoted sum, both forms of silu.

Written for `proof/explain/derive.py`. Each part is computed twice, in Python integers from `reference/equations.md` or
by the readable atoms, and the two must agree; nothing here decides a bit of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megaproof.quant import atoms
from megaproof.quant.cast import BLOCK
from megaproof.quant.formats import f32_bits, f32_from_bits, pow2

STEP = atoms.K_STEP
FRACTION = atoms.ACCUMULATOR_FRACTION


class Disagreement(AssertionError):
    """Two ways to compute one value gave other bits: a bug of the project, never of the caller."""


@dataclass(frozen=True)
class Line:
    """One printed value."""

    what: str
    bits: str | None
    """Hexadecimal, as wide as the format; None for a line of words."""
    value: float | int | None
    note: str = ""
    key: str | None = None
    """Name under which the value can be looked up."""

    def text(self) -> str:
        """'what  0x3f800000 = 1  note'."""
        shown = "" if self.bits is None else f"{self.bits} = {self.value:.9g}"
        return f"{self.what:<26} {shown:<28} {self.note}".rstrip()


@dataclass
class Section:
    """Some lines under one equation."""

    title: str
    equation: str
    lines: list[Line] = field(default_factory=list)

    def put(self, what: str, value: Tensor, note: str = "", key: str | None = None) -> None:
        """A line for a scalar tensor, decoded by its dtype (uint8 is E4M3)."""
        self.lines.append(Line(what, hexadecimal(value), number(value), note, key))

    def say(self, what: str, note: str = "", value: int | None = None, key: str | None = None) -> None:
        """A line of words, perhaps about an integer."""
        self.lines.append(Line(what, None, value, note, key))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; a number that JSON lacks (NaN, inf) becomes its name."""
        return {"title": self.title, "equation": self.equation, "lines": [_plain(line) for line in self.lines]}


def _plain(line: Line) -> dict[str, Any]:
    finite = line.value is None or abs(line.value) < float("inf")
    value = line.value if finite else str(line.value)
    return {"what": line.what, "bits": line.bits, "value": value, "note": line.note, "key": line.key}


def hexadecimal(value: Tensor) -> str:
    """Bits of a scalar of uint8, bfloat16, float32 or int32, as wide as its format."""
    width = value.element_size()
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[width]
    pattern = int(value.reshape(1).view(view)) & ((1 << 8 * width) - 1)
    return f"0x{pattern:0{2 * width}x}"


def number(value: Tensor) -> float:
    """The value of a scalar; uint8 is an E4M3 code."""
    if value.dtype == torch.uint8:
        return float(atoms.decode_e4m3(value.reshape(1)))
    return float(value)


def agree(what: str, one: Tensor, other: Tensor) -> None:
    """Raises `Disagreement` unless two scalars have the same bits."""
    if hexadecimal(one) != hexadecimal(other):
        raise Disagreement(f"{what}: {hexadecimal(one)} by one way, {hexadecimal(other)} by the other")


# --- the tensor core --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One k32 step of the tensor core, for one output element."""

    emax: int | None
    """The largest exponent of the non-zero terms; None where there is none, or a NaN or infinity decides."""
    terms: int
    """Non-zero products; the accumulator is not counted."""
    cut: int
    """Terms, the accumulator included, that lost bits below emax - 13."""
    total: int
    """Exact sum of the cut terms, in units of 2^(emax - 13)."""
    dropped: int
    """Low bits of that sum that the 14 kept bits leave out ('low 2 off')."""
    result: Tensor

    def text(self) -> str:
        if self.emax is None:
            return "no non-zero term" if not self.terms else "a NaN or an infinity decides"
        cut = f"{self.cut} cut" if self.cut else "none cut"
        kept = f", low {self.dropped} off" if self.dropped else ""
        return f"emax {self.emax}, {self.terms} products, {cut}, sum {self.total} * 2^{self.emax - FRACTION}{kept}"


def step(a: Tensor, b: Tensor, c: Tensor) -> Step:
    """a, b uint8 [32], c float32 scalar. Raises `Disagreement` if the integers and `atoms.wgmma_e4m3` differ."""
    by_atom = atoms.wgmma_e4m3(a[None], b[None], c.reshape(1, 1))[0, 0]
    pairs = [(_unpack(x), _unpack(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    products = [(sa * sb, ma * mb, ea + eb) for (sa, ma, ea), (sb, mb, eb) in pairs if ma * mb]
    has_nan = any(code & 0x7F == 0x7F for code in [*a.tolist(), *b.tolist()])
    if has_nan or not bool(torch.isfinite(c)):
        return Step(None, max(1, len(products)), 0, 0, 0, by_atom)
    bits = int(f32_bits(c.reshape(1)))
    exponent, fraction = bits >> 23 & 0xFF, bits & 0x7FFFFF
    c_term = (-1 if bits >> 31 else 1, fraction + (1 << 23 if exponent else 0), max(exponent, 1) - 127)
    # Magnitudes in units of 2^(exp - 23): a product has 6 fraction bits, the accumulator 23.
    terms = [(sign, magnitude << 17, exp) for sign, magnitude, exp in products] + ([c_term] if c_term[1] else [])
    if not terms:
        agree("a step without terms", f32_from_bits(torch.tensor(0)), by_atom)
        return Step(None, 0, 0, 0, 0, by_atom)
    emax = max(exp for _, _, exp in terms)
    shifts = [emax - exp + 23 - FRACTION for _, _, exp in terms]
    total = sum(sign * (m >> shift) for (sign, m, _), shift in zip(terms, shifts, strict=True))
    cut = sum(1 for (_, m, _), shift in zip(terms, shifts, strict=True) if m & ((1 << shift) - 1))
    dropped = max(0, abs(total).bit_length() - FRACTION - 1)
    kept = abs(total) >> dropped << dropped
    value = torch.tensor(float(-kept if total < 0 else kept) * 2.0 ** (emax - FRACTION), dtype=torch.float32)
    agree("a k32 step by integers and by the atom", value, by_atom)
    return Step(emax, len(products), cut, total, dropped, by_atom)


def _unpack(code: int) -> tuple[int, int, int]:
    """(sign +-1, significand with 3 fraction bits, exponent) of an E4M3 code; equations.md, "tensor core", 1."""
    exponent, mantissa = code >> 3 & 15, code & 7
    return (-1 if code >> 7 else 1), (8 + mantissa if exponent else mantissa), (exponent - 7 if exponent else -6)


def promoted(
    section: Section,
    a: Tensor,
    a_sf: Tensor,
    w: Tensor,
    w_sf: Tensor,
    group: int,
    shown: int,
    name: str,
    every: bool = False,
) -> Tensor:
    """Eq. (3), (6) for one element; returns the final sum, and puts block `shown` into the section step by step.

    a, w uint8 [K], a_sf float32 [K/group], w_sf float32 [K/128]. every: the other blocks get one line each.
    """
    total = torch.zeros((), dtype=torch.float32)
    for b in range(len(a) // group):
        s_a, s_w = a_sf[b], w_sf[b * group // BLOCK]
        scale = s_a * s_w
        acc = torch.zeros((), dtype=torch.float32)
        for k in range(b * group, (b + 1) * group, STEP):
            if b != shown:
                acc = atoms.wgmma_e4m3(a[None, k : k + STEP], w[None, k : k + STEP], acc.reshape(1, 1))[0, 0]
                continue
            taken = step(a[k : k + STEP], w[k : k + STEP], acc)
            acc = taken.result
            section.put(f"{name} k {k}..{k + STEP - 1}", acc, taken.text())
        before, total = total, atoms.fma(scale, acc, total)
        if b == shown:
            section.put(f"{name} scale of block {b}", scale, f"fl({_short(s_a)} * {_short(s_w)})")
            section.put(f"{name} sum before block {b}", before)
            section.put(f"{name} sum after block {b}", total, f"fma(scale, acc {hexadecimal(acc)}, sum)")
        elif every:
            note = f"fma(scale {hexadecimal(scale)}, acc {hexadecimal(acc)}, sum)"
            section.put(f"{name} sum after block {b}", total, note)
    return total


def _short(value: Tensor) -> str:
    return f"{hexadecimal(value)} = {number(value):.6g}"


# --- silu -------------------------------------------------------------------------------------------------------------


def silu(section: Section, gate: Tensor, fast: bool) -> Tensor:
    """Eq. (4)'s silu of one gate by its parts, each a line of the section; float32 scalar."""
    one = torch.ones(())
    put: Callable[..., None] = section.put
    if fast:
        argument = -gate * f32_from_bits(torch.tensor(atoms.LOG2_E))
        put("-gate * log2(e)", argument, "the argument of ex2.approx")
        exponential = atoms.ex2_approx(argument)
        put("ex2", exponential)
        denominator = one + exponential
        put("1 + ex2", denominator)
        sigmoid = atoms.rcp_approx(denominator)
        put("rcp", sigmoid, "rcp.approx: sigmoid(gate)")
    else:
        exponential = _expf(section, -gate)
        denominator = one + exponential
        put("1 + expf", denominator)
        sigmoid = torch.div(one, denominator)
        put("1 / (1 + expf)", sigmoid, "an IEEE division: sigmoid(gate)")
    result = atoms.silu(gate, fast)
    if not bool(torch.isnan(result)):
        agree("silu by its parts and by the atom", gate * sigmoid, result)
    return result


def _expf(section: Section, x: Tensor) -> Tensor:
    """The atom expf by its steps, equations.md "ex2, rcp, expf"."""

    def constant(bits: int) -> Tensor:
        return f32_from_bits(torch.tensor(bits))

    section.put("-gate", x, "the argument of expf")
    result = atoms.expf(x)
    if bool(torch.isfinite(x)):
        t = atoms.fma(x, constant(0x3BBB989D), torch.tensor(0.5)).clamp(0.0, 1.0)
        n = math.floor(float(t) * 252.0) - 126  # exact: 24 bits times 8 bits
        f = atoms.fma(x, constant(atoms.LOG2_E), torch.tensor(float(-n)))
        f = atoms.fma(x, constant(0x32A57060), f)
        exponential = atoms.ex2_approx(f)
        section.put("f", f, f"-gate * log2(e) - n, n = {n}: the argument of ex2.approx")
        section.put("ex2", exponential)
        agree("expf by its steps and by the atom", exponential * pow2(torch.tensor(n)), result)
    section.put("expf", result, "fl(ex2 * 2^n)")
    return result
