"""The compiled twins against the readable atoms, bit for bit, on a CPU (numba) and on a GPU (NVRTC)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import megaproof.quant
from megaproof.quant import atoms, philox, twin
from megaproof.quant.formats import f32_bits, f32_from_bits
from megaproof.tests.support.bad_chains import BAD_CHAINS
from megaproof.tests.support.bit_patterns import NAN, assert_same, scattered, specials
from megaproof.toolchain import gate

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)
FLOATS: dict[str, Callable[[ModuleType, Tensor], Tensor]] = {
    "rcp_approx": lambda m, x: m.rcp_approx(x),
    "ex2_approx": lambda m, x: m.ex2_approx(x),
    "expf": lambda m, x: m.expf(x),
    "silu_fast": lambda m, x: m.silu(x, True),
    "silu_precise": lambda m, x: m.silu(x, False),
    "encode_e4m3": lambda m, x: m.encode_e4m3(x),
    "encode_bf16": lambda m, x: m.encode_bf16(x),
}
IDENTITY = torch.arange(256, dtype=torch.uint8)


def compiled(device: str) -> ModuleType:
    """The twin of a device, by name: never the readable atoms that `twin.arith` may fall back to."""
    if device == "cpu":
        pytest.importorskip("numba")
        from megaproof.quant import twin_cpu

        return twin_cpu
    from megaproof.quant import twin_gpu

    return twin_gpu


def random_codes(stream: int, *shape: int, limit: int = 256) -> Tensor:
    """uint8 codes below the limit: 256 has NaN, 127 none and no sign."""
    return (philox.words(5, stream, int(torch.tensor(shape).prod())) % limit).to(torch.uint8).reshape(shape)


# --- which twin -------------------------------------------------------------------------------------------------------


def test_the_cpu_runs_the_compiled_twin_or_says_why_not() -> None:
    if "numba" in sys.modules:
        assert twin.arith("cpu") is compiled("cpu")
        assert twin.describe("cpu").startswith("numba ")
    else:
        assert "no compiled twin (" in twin.describe("cpu") or twin.arith("cpu") is compiled("cpu")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_without_a_compiler_the_readable_atoms_take_over(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    name = {"cpu": "twin_cpu", "cuda": "twin_gpu"}[kind]

    monkeypatch.setitem(sys.modules, f"megaproof.quant.{name}", None)
    monkeypatch.delattr(megaproof.quant, name, raising=False)
    module, line = twin._choose.__wrapped__(kind)
    assert module is atoms
    assert line.startswith(f"readable torch atoms on {kind}: no compiled twin (")


def test_the_gpu_twin_compiles_anywhere_and_passes_the_gate() -> None:
    from megaproof.quant import twin_gpu

    built = twin_gpu.PROGRAM.compile()
    gate.check_report(built)
    names = {"rcp_approx", "ex2_approx", "expf", "silu_fast", "silu_precise", "fma"}
    names |= {f"{way}_{format}" for way in ("encode", "decode") for format in ("e4m3", "bf16")}
    assert set(built.report.entries) == {f"map_{name}" for name in names} | {"wgmma_chain", "philox_codes"}


@on_each_device
def test_a_twin_has_every_atom(device: str) -> None:
    module = compiled(device)
    for name in ("wgmma_chain", "wgmma_e4m3", "fma", "decode_e4m3", "decode_bf16", "codes", "silu", *FLOATS):
        assert callable(getattr(module, name.removesuffix("_fast").removesuffix("_precise")))


# --- element by element -----------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("name", FLOATS)
def test_function_of_one_float(device: str, name: str) -> None:
    x, function, module = scattered(1 << 15, 2), FLOATS[name], compiled(device)
    assert_same(function(module, x.to(device)), function(atoms, x), x)


@on_each_device
@pytest.mark.parametrize("name", ["silu_fast", "silu_precise", "expf"])
def test_functions_where_they_bend(device: str, name: str) -> None:
    """Dense around +-87 .. 104, where results overflow, become subnormal and vanish."""
    x = torch.cat([torch.linspace(low, low + 2, 1 << 10) for low in range(84, 106, 2)])
    x, function, module = torch.cat([x, -x]), FLOATS[name], compiled(device)
    assert_same(function(module, x.to(device)), function(atoms, x), x)


@on_each_device
def test_every_code_is_decoded(device: str) -> None:
    module = compiled(device)
    assert_same(module.decode_e4m3(IDENTITY.to(device)), atoms.decode_e4m3(IDENTITY))
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    assert_same(module.decode_bf16(every.to(device)), atoms.decode_bf16(every))


@on_each_device
@pytest.mark.parametrize("name", ["encode_e4m3", "encode_bf16"])
def test_every_tie_is_encoded(device: str, name: str) -> None:
    """Values and middles of both formats are multiples of 2^15 in float32's bits; those, and one ulp on either side."""
    bits = (torch.arange(1 << 17)[:, None] << 15) + torch.tensor([-1, 0, 1])
    x = f32_from_bits(bits.reshape(-1) & 0xFFFFFFFF)
    assert_same(FLOATS[name](compiled(device), x.to(device)), FLOATS[name](atoms, x), x)


@on_each_device
def test_fma(device: str) -> None:
    module = compiled(device)
    x = scattered(1 << 14, 3)
    a, b, c = x, x.flip(0), x.roll(12345)
    near = -(a.double() * b.double()).float()  # cancels all but the rounding error of the product
    for addend in (c, near, f32_from_bits(f32_bits(near) ^ 1)):
        assert_same(module.fma(*(t.to(device) for t in (a, b, addend))), atoms.fma(a, b, addend))


@on_each_device
def test_fma_of_specials(device: str) -> None:
    x = specials()[::3]
    a, b, c = x[:, None, None], x[None, :, None], x[None, None, ::5]
    assert_same(compiled(device).fma(*(t.to(device) for t in (a, b, c))), atoms.fma(a, b, c))


BROADCASTS = [
    ((3, 4), (3, 1), (4,)),
    ((), (), ()),
    ((3, 1), (1, 4), ()),
    ((0, 4), (4,), (1, 1)),
    ((2, 1, 3), (5, 1), (3,)),
]


@on_each_device
@pytest.mark.parametrize("shapes", BROADCASTS, ids=str)
def test_fma_accepts_what_the_atom_accepts(device: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    operands = [torch.linspace(-2, 3 + i, max(1, int(torch.tensor(s).prod()))) for i, s in enumerate(shapes)]
    a, b, c = (t[: int(torch.tensor(s).prod())].reshape(s) for t, s in zip(operands, shapes, strict=True))
    assert_same(compiled(device).fma(*(t.to(device) for t in (a, b, c))), atoms.fma(a, b, c))


@on_each_device
@pytest.mark.parametrize("name", FLOATS)
def test_layout_does_not_count(device: str, name: str) -> None:
    """Transposed, strided, broadcast, one element, none."""
    module, function = compiled(device), FLOATS[name]
    x = torch.linspace(-9, 9, 60).reshape(5, 12)
    for view in (x.t(), x[:, ::3], x[1:2].expand(7, 12), x[0, 0], x[:0], x[:, :0], x.reshape(5, 3, 4).permute(2, 0, 1)):
        assert_same(function(module, view.to(device)), function(atoms, view))


@on_each_device
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32], ids=str)
def test_another_dtype_is_refused(device: str, name: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError):
        FLOATS[name](compiled(device), torch.ones(4, dtype=dtype, device=device))


# --- the tensor core --------------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("limit", [256, 127], ids=["with-nan", "finite"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 32), (7, 65, 96), (64, 8, 128), (66, 130, 64), (3, 2, 512)], ids=str)
def test_chain(device: str, m: int, n: int, k: int, limit: int) -> None:
    a, b = random_codes(m, m, k, limit=limit), random_codes(n + 100, n, k, limit=limit)
    signs = random_codes(200, n, k) & 0x80
    b = b | signs if limit == 127 else b
    assert_same(compiled(device).wgmma_chain(a.to(device), b.to(device)), atoms.wgmma_chain(a, b))


@on_each_device
def test_chain_with_few_nan(device: str) -> None:
    """One NaN code in a, one in b: one row and one column, in any step."""
    a, b = random_codes(1, 9, 128, limit=127), random_codes(2, 70, 128, limit=127)
    a[4, 100], b[33, 3] = 0x7F, 0xFF
    expected = atoms.wgmma_chain(a, b)
    assert int(torch.isnan(expected).sum()) == 9 + 70 - 1
    assert_same(compiled(device).wgmma_chain(a.to(device), b.to(device)), expected)


@on_each_device
def test_chain_from_any_accumulator(device: str) -> None:
    """Special values, random bits and every exponent as c, with dense, sparse and zero operands."""
    c = torch.cat([scattered(1 << 10, 4)[:2048], specials(), f32_from_bits(torch.arange(512) << 23 | 0x5A5A5A)])
    c = c[: len(c) // 8 * 8].reshape(-1, 8)
    dense = random_codes(7, len(c), 64, limit=127) | random_codes(8, len(c), 64) & 0x80
    for a in (dense, torch.where(random_codes(9, len(c), 64) < 6, dense, 0), dense * 0):
        b = random_codes(10, 8, 64, limit=127) | random_codes(11, 8, 64) & 0x80
        expected = atoms.wgmma_chain(a, b, c)
        assert_same(compiled(device).wgmma_chain(*(t.to(device) for t in (a, b, c))), expected)


@on_each_device
def test_subnormal_codes_and_signed_zeros(device: str) -> None:
    a = random_codes(12, 40, 64) & 0x87
    b = torch.where(random_codes(13, 24, 64) < 128, random_codes(14, 24, 64) & 0x80, random_codes(15, 24, 64) & 0xBF)
    c = torch.where(random_codes(16, 40, 24) < 128, -0.0, 2.0**-30)
    assert_same(compiled(device).wgmma_chain(*(t.to(device) for t in (a, b, c))), atoms.wgmma_chain(a, b, c))


@on_each_device
@pytest.mark.parametrize(
    "block", [slice(0, 64), slice(64, 128), slice(32, 96), slice(320, 384)], ids=lambda s: f"{s.start}-{s.stop}"
)
def test_a_k_block_of_a_larger_matrix(device: str, block: slice) -> None:
    """Strided rows, as megaproof.reference.gemm hands them over; the rest of the matrix is NaN codes."""
    wide_a, wide_b = (torch.full((rows, 384), 0x7F, dtype=torch.uint8) for rows in (5, 67))
    wide_a[:, block], wide_b[:, block] = random_codes(17, 5, 64, limit=127), random_codes(18, 67, 64, limit=127)
    a, b = wide_a.to(device)[:, block], wide_b.to(device)[:, block]
    assert_same(
        compiled(device).wgmma_chain(a, b), atoms.wgmma_chain(wide_a[:, block].clone(), wide_b[:, block].clone())
    )


@on_each_device
def test_other_layouts(device: str) -> None:
    """Transposed, every other row, odd offsets, one row for all, a transposed accumulator."""
    big = random_codes(19, 70, 203, limit=127)
    views = {
        "transposed": (big[:64, :9].t(), big[:64, 3:40].t()),
        "every other row": (big[::2, :64], big[1::2, 64:128]),
        "odd offset": (big[:5, 3:67], big[5:70, 101:165]),
        "expanded": (big[:1, :64].expand(6, 64), big[2:3, 8:72].expand(3, 64)),
    }
    for name, (a, b) in views.items():
        c = torch.linspace(-5, 5, a.shape[0] * b.shape[0]).reshape(b.shape[0], a.shape[0]).t()
        expected = atoms.wgmma_chain(a.clone(), b.clone(), c.clone())
        got = compiled(device).wgmma_chain(*(t.to(device) for t in (a, b, c)))
        assert_same(got, expected)
        on_device = big.to(device)
        if name == "odd offset":
            assert_same(
                compiled(device).wgmma_chain(on_device[:5, 3:67], on_device[5:70, 101:165], c.to(device)), expected
            )


@on_each_device
@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 32), (3, 0, 32), (0, 0, 64), (2, 3, 0)], ids=str)
def test_nothing_to_add_up(device: str, m: int, n: int, k: int) -> None:
    a, b = torch.zeros(m, k, dtype=torch.uint8), torch.zeros(n, k, dtype=torch.uint8)
    for c in (None, torch.full((m, n), 1.0 + 2.0**-23)):
        got = compiled(device).wgmma_chain(a.to(device), b.to(device), None if c is None else c.to(device))
        assert_same(got, atoms.wgmma_chain(a, b, c))


@on_each_device
def test_the_accumulator_is_not_written(device: str) -> None:
    a, c = random_codes(20, 4, 64, limit=127).to(device), torch.ones(4, 4, device=device)
    compiled(device).wgmma_chain(a, a, c)
    assert bool((c == 1).all())


@on_each_device
def test_batched_steps(device: str) -> None:
    """Leading dimensions broadcast as those of the atom do."""
    a, b, c = random_codes(21, 2, 3, 5, 32), random_codes(22, 3, 9, 32), torch.linspace(-9, 9, 45).reshape(5, 9)
    for operands in ((a, b, c), (a[0, 0], b[0], c), (a[:0], b, c), (a, b[0], c.expand(2, 1, 5, 9))):
        got = compiled(device).wgmma_e4m3(*(t.to(device) for t in operands))
        assert_same(got, atoms.wgmma_e4m3(*operands))


@on_each_device
@pytest.mark.parametrize("bad", BAD_CHAINS)
def test_a_chain_refuses_bad_operands_by_name(device: str, bad: str) -> None:
    *operands, error, message = BAD_CHAINS[bad]
    with pytest.raises(error, match=message):
        compiled(device).wgmma_chain(*(t if t is None else t.to(device) for t in operands))


@given(
    st.binary(min_size=64, max_size=64),
    st.binary(min_size=64, max_size=64),
    st.integers(0, 0xFFFFFFFF),
)
def test_one_output_of_any_bytes(a: bytes, b: bytes, c: int) -> None:
    operands = [torch.tensor([list(data)], dtype=torch.uint8) for data in (a, b)]
    start = f32_from_bits(torch.tensor([[c]]))
    assert_same(compiled("cpu").wgmma_chain(*operands, start), atoms.wgmma_chain(*operands, start))


# --- the generator ----------------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 4099, 1 << 16])
@pytest.mark.parametrize("seed", [0, 1, (1 << 64) - 1])
def test_codes_are_the_readable_ones(device: str, count: int, seed: int) -> None:
    for stream in (0, 6 << 32 | 255, (1 << 64) - 1):
        got = compiled(device).codes(seed, stream, count, IDENTITY.flip(0).to(device))
        assert_same(got, philox.codes(seed, stream, count, IDENTITY.flip(0)))
        assert_same(twin.codes(seed, stream, count, IDENTITY.to(device)), philox.codes(seed, stream, count, IDENTITY))


@on_each_device
def test_codes_refuse_more_than_64_bits(device: str) -> None:
    for seed, stream in ((1 << 64, 0), (0, -1)):
        with pytest.raises(ValueError, match=r"must be in \[0, 2\^64\)"):
            compiled(device).codes(seed, stream, 16, IDENTITY.to(device))


@on_each_device
def test_a_nan_result_is_the_one_nan(device: str) -> None:
    x = f32_from_bits(torch.tensor([0x7F800001, 0xFFC12345, 0xFFFFFFFF])).to(device)
    module = compiled(device)
    for name in ("rcp_approx", "ex2_approx", "expf", "silu_fast", "silu_precise"):
        assert f32_bits(FLOATS[name](module, x)).tolist() == [NAN] * 3
    assert f32_bits(module.fma(x, x, x)).tolist() == [NAN] * 3
