"""The unfused baseline: what a user runs without a fused kernel.

dispatch, grouped FP8 GEMM, SwiGLU and quantisation in Triton, grouped FP8 GEMM, scatter in BF16, combine; each its own
launch. It is held to the reference like any other kernel (`proof/adapters/baseline.py`) and is what the fused kernel
is timed against. Everything but its GEMMs equals the reference bit for bit; the GEMMs have back ends, see `backends`.
"""

from megaproof.toolchain.errors import EnvironmentMissing

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise EnvironmentMissing(
        "triton is not installed and the unfused baseline is written in it; all else works without"
    ) from error

from megaproof.kernel.baseline.backends import BACKENDS, peers
from megaproof.kernel.baseline.pipeline import Baseline, Result, claims

__all__ = ["BACKENDS", "Baseline", "Result", "claims", "peers"]
