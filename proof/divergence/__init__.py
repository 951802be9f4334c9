"""First divergence: where a layer first differs from the reference, decoded, with a guess at the pattern.

formats     bits, values and ulps of each stage            place       source, expert, tile, K block of an element
values      patterns of what happened to the bits          shape       patterns of where the wrong elements lie
find        the comparison itself                          report      its text
"""

from megaproof.proof.divergence.evidence import Pattern
from megaproof.proof.divergence.find import Comparison, Divergence, compare_stages, first_divergence

__all__ = ["Comparison", "Divergence", "Pattern", "compare_stages", "first_divergence"]
