"""The independent opinion: int64 alone, FP64 with a rigorous bound, and the field's usual FP32 reference.

Nothing of the project is imported here, so that a misreading shared by the model and its compiled twins cannot hide.
The oracle reads the same inputs (codes and scale factors of one rank's tokens) and knows the recipe only through plain
arguments.

lattice_y       y of a lattice input, bit for bit, by integers alone: no float model at all
fp64_layer      y of any finite input in float64, and a bound on how far a correct kernel may be from it
gemm_bound      the same for one block-scaled FP8 GEMM
headroom        the share of a bound that was used, max |error| / bound
relative_error  how far y is from it on average, for show
usual_reference, calc_diff   what the field compares with, to show beside ours; never a verdict
"""

from megaproof.reference.oracle.decode import Refused
from megaproof.reference.oracle.fp64 import fp64_layer, headroom, relative_error
from megaproof.reference.oracle.gemm import gemm_bound
from megaproof.reference.oracle.lattice import NotLattice, lattice_y
from megaproof.reference.oracle.usual import calc_diff, usual_reference

__all__ = [
    "NotLattice",
    "Refused",
    "calc_diff",
    "fp64_layer",
    "gemm_bound",
    "headroom",
    "lattice_y",
    "relative_error",
    "usual_reference",
]
