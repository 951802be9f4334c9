"""Generates `data/mmasim_wgmma_e4m3.safetensors` with mmasim, a bit-accurate simulator of the Hopper tensor core.

    python -m megaproof.tests.third.make_mmasim_vectors            write the file
    python -m megaproof.tests.third.make_mmasim_vectors --check    exit 1 if the file holds anything else

mmasim (PyPI, by Peichen Xie, Microsoft; its paper is arXiv 2511.10909) compiles a few lines of C++ when it is imported,
so it needs ninja and a C++ compiler. Nothing of it is copied here: the file holds its answers to inputs drawn here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch import Tensor

from megaproof.tests.third.bits import Source, to_bits, to_float

with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401  it replaces distutils, so it comes before whatever imports that

DATA = Path(__file__).parent / "data" / "mmasim_wgmma_e4m3.safetensors"
INSTRUCTION = "m64n8k32.f32.e4m3.e4m3"
M, N, K = 64, 8, 32
SEED = 20_260_101
INF = 0x7F800000

Instruction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""mmasim's: A e4m3 [64,32], B e4m3 [32,8], C float32 [64,8] -> D float32 [64,8]."""
Operands = tuple[np.ndarray, np.ndarray, np.ndarray]
"""a uint8 [M,K], b uint8 [N,K], c uint32 [M,N] (float32 bits)."""


def _zero_c() -> np.ndarray:
    return np.zeros((M, N), dtype=np.uint32)


def all_codes(s: Source) -> Operands:
    return s.codes(M, K), s.codes(N, K), _zero_c()


def narrow(s: Source) -> Operands:
    return s.narrow_codes(M, K), s.narrow_codes(N, K), s.floats(120, 140, M, N)


def wide_c(s: Source) -> Operands:
    return s.codes(M, K), s.codes(N, K), s.floats(0, 254, M, N)


def near_c(s: Source) -> Operands:
    """C within the exponents of the products, where c and products cut each other's bits."""
    return s.codes(M, K), s.codes(N, K), s.floats(112, 148, M, N)


def subnormal(s: Source) -> Operands:
    """Subnormal operands and C; most products zero, so that C alone sets the alignment in many outputs."""
    a, b = s.words(M, K).astype(np.uint8) & 0x87, s.words(N, K).astype(np.uint8) & 0x87
    keep_a, keep_b = s.below(16, M, K) == 0, s.below(16, N, K) == 0
    keep_a[: M // 2] = False  # half of the rows: no product at all, so the output is C, cut
    return np.where(keep_a, a, a & 0x80), np.where(keep_b, b, b & 0x80), s.floats(0, 2, M, N)


def signed_zeros(s: Source) -> Operands:
    return s.words(M, K).astype(np.uint8) & 0x80, s.codes(N, K), s.words(M, N) & np.uint32(1 << 31)


def cancelling(s: Source) -> Operands:
    """Each product occurs twice with opposite signs, except the last pair: leading bits vanish."""
    a, b = s.codes(M, K), s.codes(N, K)
    a[:, 1::2], b[:, 1::2] = a[:, ::2] ^ 0x80, b[:, ::2]
    a[:, -1] = s.codes(M, 1)[:, 0]
    return a, b, s.floats(100, 110, M, N)


def one_product(s: Source) -> Operands:
    """A single non-zero product and C of every distance to it: the alignment at its edges."""
    a, b = np.zeros((M, K), dtype=np.uint8), s.codes(N, K)
    where = s.below(K, M)
    a[np.arange(M), where] = s.codes(M, 1)[:, 0]
    return a, b, s.floats(90, 160, M, N)


def nan_and_inf(s: Source) -> Operands:
    """NaN codes of both signs in a few rows; C NaN with random payloads, and infinite."""
    a, b, c = s.codes(M, K), s.codes(N, K), s.floats(0, 254, M, N)
    for codes, rows in ((a, s.below(M, 6)), (b, s.below(N, 2))):
        codes[rows, s.below(K, len(rows))] = 0x7F | (s.words(len(rows)).astype(np.uint8) & 0x80)
    kind = s.below(6, M, N)
    special = s.words(M, N) | np.uint32(INF)  # a NaN unless its 23 bits are all 0
    c = np.where(kind == 0, special, c)
    return a, b, np.where(kind == 1, special & np.uint32(0xFF800000), c)


FAMILIES: dict[str, Callable[[Source], Operands]] = {
    f.__name__: f
    for f in (all_codes, narrow, wide_c, near_c, subnormal, signed_zeros, cancelling, one_product, nan_and_inf)
}


def instruction() -> Instruction:
    """mmasim's wgmma. Raises ImportError, OSError or RuntimeError where it, ninja or a compiler is missing."""
    # torch looks for ninja on PATH; in an environment that was not activated it lies beside the interpreter. The build
    # goes to a folder of its own: in the shared one, a lock left behind by a killed process is waited for for ever.
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    with (
        tempfile.TemporaryDirectory() as build,
        mock.patch.dict(os.environ, {"TORCH_EXTENSIONS_DIR": build, "PATH": path}),
    ):
        from mmasim.nv_ptx import WGMMA

    return WGMMA("Hopper", INSTRUCTION)


def simulate(op: Instruction, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """mmasim's answer: a uint8 [M,k], b uint8 [N,k], c uint32 [M,N] -> uint32 [M,N], k a multiple of 32, chained."""
    d = to_float(c)
    for k in range(0, a.shape[1], K):
        a_step = torch.from_numpy(a[:, k : k + K].copy()).view(torch.float8_e4m3fn)
        b_step = torch.from_numpy(b[:, k : k + K].copy()).view(torch.float8_e4m3fn)
        d = op(a_step, b_step.T, d)
    return to_bits(d)


def tensors(op: Instruction, seed: int = SEED, tiles: int = 2) -> dict[str, np.ndarray]:
    """`<family>/a|b|c|d` with a leading axis of tiles, and `chain/...`: K = 128 from zero, d after four steps."""
    result = {}
    for stream, (name, family) in enumerate(FAMILIES.items()):
        source = Source(seed, stream)
        drawn = [family(source) for _ in range(tiles)]
        drawn = [(*operands, simulate(op, *operands)) for operands in drawn]
        result |= {
            f"{name}/{key}": np.stack(arrays) for key, arrays in zip("abcd", zip(*drawn, strict=True), strict=True)
        }
    source = Source(seed, len(FAMILIES))
    chain = (source.narrow_codes(M, 4 * K), source.codes(N, 4 * K), _zero_c())
    result |= {f"chain/{key}": array[None] for key, array in zip("abcd", (*chain, simulate(op, *chain)), strict=True)}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed file, write nothing")
    arguments = parser.parse_args()
    try:
        op = instruction()
    except (ImportError, OSError, RuntimeError) as error:
        print(f"mmasim cannot run here: {error}", file=sys.stderr)
        return 3
    made = tensors(op)
    outputs = sum(array.size for name, array in made.items() if name.endswith("/d"))
    if arguments.check:
        held = load_file(DATA)
        different = [n for n in made | held if n not in made or n not in held or not np.array_equal(made[n], held[n])]
        print(f"{outputs} outputs, {len(different)} tensors differ from {DATA.name} {different or ''}")
        return 1 if different else 0
    metadata = {"producer": f"mmasim {version('mmasim')}", "instruction": f"wgmma {INSTRUCTION}", "seed": str(SEED)}
    half_written = DATA.with_suffix(".part")
    half_written.write_bytes(save(made, metadata=metadata))
    half_written.replace(DATA)
    print(f"{DATA.name}: {outputs} outputs, {DATA.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
