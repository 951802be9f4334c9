"""A case, computed by the reference: its inputs are made, the layer runs, and both are handed out together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megaproof.cases import inputs
from megaproof.cases.cases import Case
from megaproof.cases.inputs import Inputs
from megaproof.quant.host_state import guarded
from megaproof.reference.arguments import Dimensions
from megaproof.reference.layer import LayerResult, moe_layer


class InputsWritten(RuntimeError):
    """The layer wrote to its inputs, so nothing that it returned can be trusted."""


@dataclass(frozen=True)
class CaseRun:
    """What a case's inputs are, and what the reference makes of them."""

    case: Case
    inputs: Inputs
    result: LayerResult
    sha256: str
    """Digest of the inputs, see `Inputs.sha256`."""

    @property
    def trace(self) -> dict[str, Tensor]:
        """The stages by name, and 'rows'. Raises ValueError where the case was run without a trace."""
        if self.result.trace is None:
            raise ValueError(f"{self.case.id} was run without a trace")
        return self.result.trace


def default_device() -> torch.device:
    """The first GPU where torch sees one, else the CPU; the bits are the same."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dimensions(case: Case, device: torch.device | str = "cpu") -> Dimensions:
    """The sizes on which all ranks of a case agree; device: where their tensors are."""
    shape = case.shape
    return Dimensions(case.ranks, shape.hidden, shape.topk, shape.experts, case.tokens, torch.device(device))


@guarded
def run_case(
    case: Case,
    device: torch.device | str | None = None,
    trace: bool = True,
    progress: Callable[[int, int], None] | None = None,
    made: Inputs | None = None,
) -> CaseRun:
    """Runs the reference on a case.

    Args:
        case: what to compute.
        device: where to compute it; None: see `default_device`. Inputs that are given stay where they are.
        trace: whether every stage is kept, or y and statistics alone.
        progress: called as progress(done, total) after each expert that received a row.
        made: the case's inputs, where they exist already.

    Raises:
        InputsWritten: the layer changed its inputs.
        ValueError: the case's family can't make inputs of its shape.
    """
    made = made or inputs.make(case, device or default_device())
    sha256 = made.sha256()
    result = moe_layer(case.recipe, *made.arguments(), trace=trace, experts=case.shape.experts, progress=progress)
    if made.sha256() != sha256:
        raise InputsWritten(f"{case.id}: the layer wrote to its inputs")
    return CaseRun(case, made, result, sha256)
