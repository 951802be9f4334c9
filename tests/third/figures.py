"""Figures that say why the atoms cannot be replaced by something simpler: `python -m megaproof.tests.third.figures`.

1. In what share of outputs a K = 128 tensor-core chain is the correctly rounded dot product.
2. How often float64 arithmetic, rounded to float32 at the end, misses a fused multiply-add.
3. How far the special-function unit's tables, and expf and silu on top of them, are from exact values.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import numpy as np
import torch

from megaproof.quant import atoms, tables
from megaproof.tests.third import fma_cases, rounded, special
from megaproof.tests.third.bits import Source, to_bits, to_float

K = 128


def normal_codes(s: Source, rows: int, k: int, sigma: float) -> np.ndarray:
    """E4M3 codes of nearly normal values (twelve uniforms each, so that no libm draws them), saturating."""
    uniform = s.words(12, rows, k).astype(np.float64) / 2**32
    return atoms.encode_e4m3(torch.from_numpy(((uniform.sum(0) - 6.0) * sigma).astype(np.float32))).numpy()


OPERANDS: dict[str, Callable[[Source, int, int], np.ndarray]] = {
    "normal, sigma 1": functools.partial(normal_codes, sigma=1.0),
    "normal, sigma 150": functools.partial(normal_codes, sigma=150.0),
    "all codes alike": Source.codes,
    "magnitude 1/8 to 15": Source.narrow_codes,
}


def chain_equals_rounded_dot(name: str, rows: int) -> float:
    """Share of `rows`^2 outputs in which the chain of four steps from 0 has the bits of the rounded exact sum."""
    s = Source(51)
    a, b = (torch.from_numpy(OPERANDS[name](s, rows, K)) for _ in range(2))
    chain = atoms.wgmma_chain(a, b)
    # Exact in float64: products are multiples of 2^-18 below 2^18, and 128 of them stay below 2^53 such units.
    dot = (atoms.decode_e4m3(a).double() @ atoms.decode_e4m3(b).double().T).float()
    return float((to_bits(chain) == to_bits(dot)).mean())


def naive_fma_failures(family: str, count: int) -> float:
    """Share of `count` triples in which float32(float64(a * b + c)) is not fma(a, b, c); NaN counts as one value."""
    a, b, c = (to_float(bits) for bits in fma_cases.FAMILIES[family](Source(52), count))
    naive, fused = (a.double() * b.double() + c.double()).float(), atoms.fma(a, b, c)
    return float(((to_bits(naive) != to_bits(fused)) & ~torch.isnan(fused).numpy()).mean())


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m megaproof.tests.third.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    print("K = 128 chain equals the correctly rounded dot product (262,144 outputs each)")
    for name in OPERANDS:
        print(f"  {name:22} {chain_equals_rounded_dot(name, 512):8.3%}")
    print("float64 multiply-add, rounded to float32, differs from fma (1,000,000 triples each)")
    for family in fma_cases.FAMILIES:
        print(f"  {family:22} {naive_fma_failures(family, 1_000_000):8.3%}")
    try:
        chip = {name: tables.load(name).numpy().astype(np.int64) for name in tables.NAMES}
    except tables.TableError as error:
        print(f"special functions: {error}")
        return
    print(f"special-function tables of {tables.DEFAULT_CHIP}: entries below / at / above the nearest value, error")
    nearest = {"rcp": rounded.reciprocal, "ex2": rounded.exp2}
    worst = {"rcp": rounded.reciprocal_error, "ex2": rounded.exp2_error}
    for name, bits in chip.items():
        below, at, above = (int((bits - nearest[name]() == step).sum()) for step in (-1, 0, 1))
        print(f"  {name:22} {below} / {at} / {above}, at most {worst[name](bits):.3f} ulp")
    print(f"  {'expf':22} at most {max(special.expf_errors(20_000)):.3f} ulp in a sample")
    for fast in (True, False):
        share = max(special.silu_shares_of_bound(fast, 20_000))
        print(f"  {'silu, fast' if fast else 'silu, precise':22} at most {share:.3f} of the bound in a sample")


if __name__ == "__main__":
    main()
