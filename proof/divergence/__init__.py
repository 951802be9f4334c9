"""First divergence: where a layer first differs from the reference, decoded, with a guess at the pattern.

find        the comparison itself                          place       source, expert, tile, K block of an element
values      patterns of what happened to the bits          shape       patterns of where the wrong elements lie
evidence    what both look at                              report      the text
"""

from megaproof.proof.divergence.evidence import Pattern
from megaproof.proof.divergence.find import Comparison, Divergence, compare_stages, first_divergence

__all__ = ["Comparison", "Divergence", "Pattern", "compare_stages", "first_divergence"]
