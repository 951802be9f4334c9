"""`python -m bench dense`: the dense promoted GEMM beside cuBLASLt's, the main loop of the kernel alone."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from megaproof.bench import files
from megaproof.bench.measure.points import UsageError
from megaproof.bench.measure.sweep import provenance
from megaproof.bench.measure.timer import FLUSH_BYTES, FLUSHES, WARM_UPS, Timer
from megaproof.kernel.programs import dense
from megaproof.toolchain.errors import EnvironmentMissing
from megaproof.toolchain.launch import require_device

GROUPS = (128, 64)
Size = tuple[int, int, int]
"""M, N, K."""
SIZES: tuple[Size, ...] = (
    (8192, 4096, 4096),
    (8192, 8192, 8192),
    (8192, 4096, 2048),
    (8192, 7168, 3072),
    (49152, 4096, 4096),
    (49152, 4096, 2048),
    (8192, 6144, 7168),
    (4096, 7168, 4096),
)
"""Both GEMMs of dsv4_flash, at 8192 rows and at those of 8192 tokens; dsv4_pro's second; a cube; two of DeepGEMM's."""


def what(repeats: int) -> str:
    """A result's first line, in words."""
    return (
        "dense promoted GEMM (dense.cu, gemm.cuh), float32 output, CUDA events around the call, "
        f"{FLUSHES * FLUSH_BYTES >> 30} GiB of memset before each, median of {repeats} after {WARM_UPS}; cublaslt: "
        "torch._scaled_mm, one scale a tensor, bf16 output, use_fast_accum False, in turn in the same run"
    )


def parse_size(text: str) -> Size:
    """'8192x4096x2048' -> M, N, K. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})x(\d{1,9})", text, re.ASCII)
    m, n, k = map(int, match.groups()) if match else (0, 0, 0)
    if any(extent <= 0 or extent % dense.BLOCK for extent in (m, n, k)):
        raise UsageError(f"--size {text!r} must be MxNxK, each a positive multiple of {dense.BLOCK}")
    return m, n, k


def dense_row(group: int, size: Size, us: float, cublaslt_us: float) -> dict[str, Any]:
    """One line of a result; times in us, medians."""
    m, n, k = size
    flops = 2 * m * n * k
    row = {"group": group, "m": m, "n": n, "k": k, "us": round(us, 1), "tflops": round(flops / us / 1e6)}
    return row | {"cublaslt_us": round(cublaslt_us, 1), "cublaslt_tflops": round(flops / cublaslt_us / 1e6)}


def times(calls: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median us of each call; they take turns, L2 flushed before each."""
    timer, turns = Timer(False, repeats), []
    for _ in range(WARM_UPS + repeats):
        for call in calls:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            timer.flush()
            before.record()
            call()
            after.record()
            turns.append((before, after))
    torch.cuda.synchronize()
    found = [1e3 * before.elapsed_time(after) for before, after in turns[WARM_UPS * len(calls) :]]
    return [statistics.median(found[n :: len(calls)]) for n in range(len(calls))]


def rows(size: Size, repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each of GROUPS."""
    m, n, k = size
    generator = torch.Generator("cuda").manual_seed(0)

    def codes(count: int) -> Tensor:
        normal = torch.randn(count, k, generator=generator, device="cuda").mul_(100)
        return normal.clamp_(-448, 448).to(torch.float8_e4m3fn)

    a, b, out = codes(m), codes(n), torch.empty(m, n, device="cuda")
    b_sf = torch.rand(n // 128, k // 128, generator=generator, device="cuda")
    one = torch.ones((), device="cuda")

    def cublaslt() -> None:
        torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=False)

    def promoted(group: int) -> Callable[[], Any]:
        a_sf = torch.rand(k // group, m, generator=generator, device="cuda")
        return lambda: dense.dense(a.view(torch.uint8), a_sf, b.view(torch.uint8), b_sf, group, out)

    blas, *ours = times([cublaslt, *map(promoted, GROUPS)], repeats)
    for group, us in zip(GROUPS, ours, strict=True):
        yield dense_row(group, size, us, blas)


def measure(sizes: list[Size], repeats: int) -> dict[str, Any]:
    """A result as it is written to JSON; progress goes to stderr. Raises EnvironmentMissing."""
    code = {"dense": dense.PROGRAM.compile().code()}
    result = {"what": what(repeats), **provenance(require_device(), code), "rows": []}
    for size in sizes:
        for row in rows(size, repeats):
            result["rows"].append(row)
            print(_line(row), file=sys.stderr)
    return result


def _line(row: dict[str, Any]) -> str:
    cublaslt = f"cuBLASLt {row['cublaslt_us']} us, {row['cublaslt_tflops']} TFLOP/s"
    name = f"{row['m']}x{row['n']}x{row['k']} per {row['group']}"
    return f"{name}: {row['us']} us, {row['tflops']} TFLOP/s; {cublaslt}"


def dense_command(
    sizes: Annotated[
        list[str] | None, typer.Option("--size", metavar="MxNxK", help="Repeatable. Default: the results' six.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Launches of each that count.")] = 20,
    json_path: Annotated[str | None, typer.Option("--json", help="Where to write JSON; - is stdout.")] = None,
) -> None:
    """Times the dense promoted GEMM, per 128 and per 64, in turn with cuBLASLt's FP8 GEMM, one scale a tensor.

    Exit status: 0 done, 2 usage, 3 environment.
    """
    try:
        chosen = [parse_size(text) for text in sizes] if sizes else list(SIZES)
        files.check_json(json_path)
        result = measure(chosen, repeats)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None
    except EnvironmentMissing as error:
        print(f"environment: {error}", file=sys.stderr)
        raise typer.Exit(3) from error
    if json_path == files.STDOUT:
        print(json.dumps(result, indent=1))
    elif json_path:
        files.write_json(result, json_path)
