"""Converts published H100 and H200 measurements of the FP8 tensor core into `data/matlab_tensor_core_e4m3.safetensors`.

    python -m megaproof.tests.third.convert_matlab_tensor_core CLONE [--commit COMMIT]

CLONE is a clone (or a bare git directory) of github.com/north-numerical-computing/MATLAB-tensor-core, BSD 2-Clause, see
NOTICE. Its folder model_validation holds, for each chip and format, 5,000 random dot products of 32 terms.

Which instruction, and what accumulator. The CUDA source beside the data issues mma.sync.m16n8k32 with the C of the
`c_*` files. The H100 and H200 E4M3 results are something else: the authors' own Validate_TC_models.m drops C there and
says "D is zero for fp8 with WGMMA". The bits agree with that remark alone: mmasim's wgmma with C = 0 gives all 5,000,
its FP16 mma.sync (what sm_90 turns an FP8 mma.sync into) with C = 0 gives 2,011, wgmma with the C of the files gives
none for H100 and 2 for H200. So the vectors are one wgmma k32 step from zero, and the `c_*` files are not taken.

What is changed: float32 values in hex become E4M3 codes (every value is one, checked), results in binary digits become
uint32. All 5,000 are kept, in their order. The A, B and D files of H100 and H200 are the same, byte for byte (checked),
so they are stored once; that two chips gave the same bits is the publishers' word.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save

DATA = Path(__file__).parent / "data" / "matlab_tensor_core_e4m3.safetensors"
SOURCE = "https://github.com/north-numerical-computing/MATLAB-tensor-core"
COMMIT = "b12b5a700957655375a1b0c1d0c26e76065da015"
CHIPS = ("H100", "H200")
K = 32
LICENCE_SHA256 = "1fb3b38cdcc2483e81bcd8422321d25553f76f540f1c3089e04114e398363a8c"
"""The licence text that NOTICE repeats; with another one the file must not be converted unread."""


class SourceError(RuntimeError):
    """The clone lacks something, or holds something other than what the docstring of this module describes."""


def read(clone: Path, commit: str, path: str) -> bytes:
    result = subprocess.run(["git", "-C", clone, "show", f"{commit}:{path}"], capture_output=True, check=False)
    if result.returncode:
        raise SourceError(f"{path} at {commit}: {result.stderr.decode(errors='replace').strip()}")
    return result.stdout


def e4m3_values() -> np.ndarray:
    """float32 bits of the 256 codes' values, from the definition (OCP FP8); NaN codes become 0xffffffff."""
    code = np.arange(256)
    field, fraction = code >> 3 & 15, code & 7
    magnitude = np.where(field > 0, 8 + fraction, fraction) * 2.0 ** (np.maximum(field, 1) - 10)
    bits = np.where(code & 0x80, -magnitude, magnitude).astype(np.float32).view(np.uint32)
    return np.where(code & 0x7F == 0x7F, np.uint32(0xFFFFFFFF), bits)


def operand(text: bytes, name: str) -> np.ndarray:
    """Lines of 32 float32 in hex -> E4M3 codes uint8 [n, 32]. Raises SourceError for a value that is not one."""
    bits = np.array([[int(word, 16) for word in line.split()] for line in text.splitlines()], dtype=np.uint32)
    if bits.ndim != 2 or bits.shape[1] != K:
        raise SourceError(f"{name} has shape {bits.shape}; rows of {K} values are expected")
    values = e4m3_values()
    order = np.argsort(values)
    found = order[np.searchsorted(values, bits, sorter=order).clip(max=255)]
    if not np.array_equal(values[found], bits):
        raise SourceError(f"{name} holds values that are not E4M3")
    return found.astype(np.uint8)


def result(text: bytes) -> np.ndarray:
    """Lines of 32 binary digits -> uint32 [n]."""
    return np.array([int(line, 2) for line in text.split()], dtype=np.uint32)


def convert(clone: Path, commit: str) -> dict[str, np.ndarray]:
    """a uint8 [n,32], b uint8 [n,32], d uint32 [n]: row i is one dot product."""
    licence = hashlib.sha256(read(clone, commit, "LICENCE")).hexdigest()
    if licence != LICENCE_SHA256:
        raise SourceError(f"the licence has sha256 {licence}; NOTICE repeats the text of {LICENCE_SHA256}")
    texts = {}
    for chip in CHIPS:
        folder = f"model_validation/{chip}/E4M3"
        names = (f"a_{chip}_E4M3.txt", f"b_{chip}_E4M3.txt", f"d_{chip}_fp32.txt")
        texts[chip] = [read(clone, commit, f"{folder}/{name}") for name in names]
    if texts["H100"] != texts["H200"]:
        raise SourceError("H100 and H200 no longer hold the same vectors: store one set a chip")
    a, b, d = texts["H200"]
    return {"a": operand(a, "a"), "b": operand(b, "b"), "d": result(d)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="path of a clone of the repository")
    parser.add_argument("--commit", default=COMMIT, help="commit to read (default: the one NOTICE names)")
    arguments = parser.parse_args()
    try:
        made = convert(arguments.clone, arguments.commit)
    except SourceError as error:
        print(error, file=sys.stderr)
        return 3
    metadata = {"source": SOURCE, "commit": arguments.commit, "licence": "BSD-2-Clause", "chips": " ".join(CHIPS)}
    half_written = DATA.with_suffix(".part")
    half_written.write_bytes(save(made, metadata=metadata))
    half_written.replace(DATA)
    print(f"{DATA.name}: {len(made['d'])} outputs, {DATA.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
