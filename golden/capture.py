"""Captures what the chip at hand computes, and holds the atoms of quant/ to it: `python -m golden capture`.

Tables of the special-function unit first, then everything else against atoms that read those tables: tensor-core tiles
of every family, width and operand source; every 32-bit input of the elementwise functions; fma on chosen triples.
Nothing is written unless every comparison has 0 mismatches, and the manifest goes last.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from megaproof.golden import silicon, tiles, triples
from megaproof.kernel.programs.probe import A_SOURCES, WIDTHS, Probes
from megaproof.quant import atoms, tables
from megaproof.toolchain.build import Built
from megaproof.toolchain.errors import BuildError, EnvironmentMissing
from megaproof.toolchain.launch import Device

VECTOR_WIDTHS = {8: 4, 64: 1, 128: 1, 256: 1}
"""Widths of the committed tensor-core vectors -> tiles of each."""


@dataclass(frozen=True)
class Effort:
    """How much is compared.

    Tensor core: parts of a run and outputs of a part, for each family, width and source of A. fma: parts of a run and
    triples of a part. Sweeps: inputs, all 2^32 or as many spread over them, and inputs of one launch.
    """

    parts: int
    outputs: int
    fma_parts: int
    triples: int
    inputs: int
    chunk: int


FULL = Effort(4, 1 << 20, 16, 1 << 22, silicon.ALL_INPUTS, 1 << 25)
QUICK = Effort(1, 1 << 18, 1, 1 << 22, 1 << 25, 1 << 25)
BRING_UP = Effort(1, 1, 1, 1 << 20, 1 << 20, 1 << 20)


class ChipUnderTest(Protocol):
    """The instructions of a chip; megaproof.kernel.programs.probe.Probes is the real one."""

    device: Device

    def wgmma(self, a: Tensor, b: Tensor, c: Tensor, scale_d: bool, a_from: str) -> Tensor: ...
    def sweep(self, name: str, start: int, count: int, inputs: Tensor | None = None) -> Tensor: ...
    def fma(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor: ...


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def _two_lanes(x: Tensor) -> Tensor:
    low = atoms.encode_e4m3((~x.view(torch.int32)).view(torch.float32))
    return ((atoms.encode_e4m3(x).to(torch.int32) << 8) | low).to(torch.int16)


EXPECTED: dict[str, Callable[[Tensor], Tensor]] = {
    "rcp": atoms.rcp_approx,
    "ex2": atoms.ex2_approx,
    "exp_steps": atoms.expf,
    "expf": atoms.expf,
    "silu_fast": lambda x: atoms.silu(x, True),
    "silu_precise": lambda x: atoms.silu(x, False),
    "rcp_rn": lambda x: atoms.fma(torch.div(torch.ones_like(x), x), torch.ones_like(x), torch.full_like(x, -0.0)),
    "e4m3x2": _two_lanes,
    "bf16": atoms.encode_bf16,
}
"""Sweep -> what the atoms predict for it, compared bit for bit."""


class ChipDiffers(RuntimeError):
    """The chip and the atoms disagree; nothing was written (exit status 1)."""


class MismatchCount:
    """Counts outputs and mismatches of one name, keeps a digest, prints the first mismatches with their inputs."""

    def __init__(self, name: str, console: Console) -> None:
        self.name, self.outputs, self.mismatches = name, 0, 0
        self._console, self._digest = console, silicon.Digest()

    def add(self, chip: Tensor, model: Tensor, describe: Callable[[int], str]) -> None:
        """chip, model: bits of one integer dtype and shape; describe(flat index) names an input."""
        chip, model = chip.reshape(-1), model.reshape(-1)
        self.outputs += chip.numel()
        self._digest.update(chip)
        wrong = chip != model
        count = int(wrong.sum())
        if count and self.mismatches < 4:
            for i in wrong.nonzero().flatten()[:4].tolist():
                mask = (1 << 8 * chip.element_size()) - 1
                found, wanted = int(chip[i]) & mask, int(model[i]) & mask
                self._console.print(f"  {self.name}: {describe(i)}: chip {found:#x}, atoms {wanted:#x}")
        self.mismatches += count

    def result(self) -> dict[str, Any]:
        return {"outputs": self.outputs, "mismatches": self.mismatches, "digest": self._digest.hexdigest()}


def run(out_dir: Path = silicon.FOLDER, quick: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Captures the current device into out_dir and returns its section of the manifest.

    quick: a small part of everything, and nothing is written. Raises EnvironmentMissing without an SM90 chip, and
    ChipDiffers when an output is not what the atoms predict.
    """
    if not quick:
        silicon.check_folder(Path(out_dir))  # at once, and not after minutes of measuring
    chip, console = Probes(), console or Console()
    section, files = measure(chip, QUICK if quick else FULL, versions(chip.built), console)
    if not quick:
        silicon.publish(Path(out_dir), chip.device.chip, section, files)
        console.print(f"{chip.device.chip}: captured into {out_dir}")
    return section


def bring_up(console: Console | None = None) -> dict[str, Any]:
    """A first look in seconds: one tile a family, width and source of A, 2^20 inputs a function; nothing is written."""
    chip = Probes()
    return measure(chip, BRING_UP, versions(chip.built), console or Console())[0]


def measure(
    chip: ChipUnderTest, effort: Effort, about: dict[str, str], console: Console
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest's section of a chip, `about` included, and its data files by name. Raises ChipDiffers."""
    device = f"cuda:{chip.device.index}" if chip.device.index >= 0 else "cpu"
    files: dict[str, bytes] = {}
    section: dict[str, Any] = {"device": chip.device.name, "driver": chip.device.driver, **about, "tables": {}}
    console.print(
        f"{chip.device.name}, driver {chip.device.driver}, " + ", ".join(f"{k} {v}" for k, v in about.items())
    )
    captured = capture_tables(chip, device)
    for name, bits in captured.items():
        table = bits.cpu().numpy()
        blob = tables.encode_table(name, table)
        if not np.array_equal(tables.decode_table(name, blob), table):
            raise ChipDiffers(f"table {name} of {chip.device.chip} does not survive its own packing")
        file = silicon.pack(files, name, {name: torch.from_numpy(blob.copy())})
        section["tables"][name] = {**file, "sha256": tables.digest(table)}
        console.print(f"table {name}: {blob.size:,} bytes packed, sha256 {tables.digest(table)[:16]}")

    with _tables_in_force(captured):
        run = functools.partial(_each, chip=chip, effort=effort, device=device, console=console)
        section["wgmma"] = run("wgmma", tiles.FAMILIES, compare_wgmma)
        section["fma"] = run("fma", triples.FAMILIES, compare_fma)
        section["sweeps"] = run("sweep", EXPECTED, compare_sweep)
        wrong = [name for kind in ("wgmma", "fma", "sweeps") for name, r in section[kind].items() if r["mismatches"]]
        if wrong:
            raise ChipDiffers(
                f"{chip.device.chip} and quant/atoms.py differ in {', '.join(wrong)}; nothing was written"
            )

    outputs, groups = capture_vectors(chip, device)
    section["vectors"] = {**silicon.pack(files, "wgmma", outputs), "groups": groups}
    return section, files


def versions(built: Built) -> dict[str, str]:
    """What the capture is made with."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    made = {"cuda": str(torch.version.cuda), "nvrtc": built.nvrtc, "torch": torch.__version__, "cubin": built.sha256}
    return {**made, "date": date}


def capture_tables(chip: ChipUnderTest, device: str) -> dict[str, Tensor]:
    """int32 [2^23] each: fp32 bits of rcp.approx over [1, 2) and of ex2.approx at i / 2^23."""
    fractions = torch.arange(tables.SIZE, device=device).to(torch.float32) * 2.0**-23  # exact
    ex2 = chip.sweep("ex2", 0, tables.SIZE, fractions.view(torch.int32))
    return {"rcp": chip.sweep("rcp", 0x3F800000, tables.SIZE), "ex2": ex2}


def capture_vectors(chip: ChipUnderTest, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The chip's outputs for a few tiles of every family and width, the same from both sources of A."""
    outputs, groups = {}, {}
    for family, spec in tiles.FAMILIES.items():
        for n, cases in VECTOR_WIDTHS.items():
            a, b, c = tiles.tiles(family, n, cases, device=device)
            shared, registers = (chip.wgmma(a, b, c, spec.scale_d, source) for source in ("shared", "registers"))
            if not torch.equal(shared, registers):
                raise ChipDiffers(
                    f"wgmma {family} n{n}: A from shared memory and from registers give different outputs"
                )
            name = f"{family}.n{n}"
            outputs[name] = shared.cpu()
            groups[name] = {"family": family, "n": n, "cases": cases, "inputs_sha256": tiles.input_digest(a, b, c)}
    return outputs, groups


def predict_wgmma(a: Tensor, b: Tensor, c: Tensor, scale_d: bool) -> Tensor:
    """What the atoms say a chain of steps gives: int32 bits [cases, 64, N]."""
    acc = c if scale_d else torch.zeros_like(c)
    for k in range(0, a.shape[-1], atoms.K_STEP):
        acc = atoms.wgmma_e4m3(a[..., k : k + atoms.K_STEP], b[..., k : k + atoms.K_STEP], acc)
    return acc.view(torch.int32)


def compare_wgmma(chip: ChipUnderTest, family: str, effort: Effort, device: str, total: MismatchCount) -> None:
    """Tiles of every width through both sources of A."""
    scale_d = tiles.FAMILIES[family].scale_d
    for n in WIDTHS:
        for part in range(effort.parts):
            a, b, c = tiles.tiles(family, n, max(1, effort.outputs // (64 * n)), part, device)
            model = predict_wgmma(a, b, c, scale_d)
            for source in A_SOURCES:
                where = f"n {n}, A from {source}, part {part}, flat output {{}}"
                total.add(chip.wgmma(a, b, c, scale_d, source), model, where.format)


def compare_fma(chip: ChipUnderTest, family: str, effort: Effort, device: str, total: MismatchCount) -> None:
    """Triples of a family."""
    for part in range(effort.fma_parts):
        a, b, c = triples.triples(family, effort.triples, part, device)

        def describe(i: int, operands: tuple[Tensor, ...] = (a, b, c)) -> str:
            return ", ".join(f"{int(_bits(t)[i]) & 0xFFFFFFFF:#010x}" for t in operands)

        total.add(chip.fma(a, b, c), _bits(atoms.fma(a, b, c)), describe)


def compare_sweep(chip: ChipUnderTest, name: str, effort: Effort, device: str, total: MismatchCount) -> None:
    """A function over fp32 bit patterns."""
    stride = silicon.ALL_INPUTS // effort.inputs
    for start in range(0, effort.inputs, effort.chunk):
        index = torch.arange(start, start + effort.chunk, dtype=torch.int64, device=device)
        bits = index * stride + index * 0x9E3779B1 % stride  # the second term: another place in each stride
        bits = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)
        found = chip.sweep(name, start, effort.chunk, None if stride == 1 else bits)
        wanted = _bits(EXPECTED[name](bits.view(torch.float32)))

        def describe(i: int, bits: Tensor = bits) -> str:
            return f"input {int(bits[i]) & 0xFFFFFFFF:#010x}"

        total.add(found, wanted, describe)


def _each(
    kind: str,
    names: Iterable[str],
    compare: Callable[..., None],
    chip: ChipUnderTest,
    effort: Effort,
    device: str,
    console: Console,
) -> dict[str, Any]:
    results = {}
    for name in names:
        total, begun = MismatchCount(name, console), time.perf_counter()
        compare(chip, name, effort, device, total)
        results[name] = total.result()
        seconds = time.perf_counter() - begun
        console.print(f"{kind:5} {name:16} {total.mismatches:,} mismatches of {total.outputs:,} ({seconds:.1f} s)")
    return results


@contextlib.contextmanager
def _tables_in_force(captured: dict[str, Tensor]) -> Iterator[None]:
    """The atoms read the tables just captured: the stored ones may be missing, or another chip's."""
    before = tables.load
    tables.load = lambda name, *_, **__: captured[name]
    try:
        yield
    finally:
        tables.load = before


def main() -> None:
    """`python -m megaproof.golden.capture --bringup`: status 0 proven, 1 differs, 2 usage, 3 environment."""
    usage = "usage: python -m megaproof.golden.capture --bringup (the capture itself: python -m golden capture)"
    if sys.argv[1:] == ["--help"]:
        print(usage)
        sys.exit(0)
    if sys.argv[1:] != ["--bringup"]:
        print(usage, file=sys.stderr)
        sys.exit(2)
    try:
        bring_up()
    except EnvironmentMissing as error:
        print(f"environment: {error}", file=sys.stderr)
        sys.exit(3)
    except (BuildError, ChipDiffers) as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
