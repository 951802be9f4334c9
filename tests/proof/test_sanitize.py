"""What a run of compute-sanitizer showed, read from its text; and that its case is the one that is meant. No GPU."""

from __future__ import annotations

import pytest
import torch

from megaproof.cases import inputs
from megaproof.kernel.host.sizes import BLOCK_M
from megaproof.proof import sanitize
from megaproof.proof.sanitize import DONE, RANKS, Verdict

CLEAN = "========= ERROR SUMMARY: 0 errors"
API_CALL = '========= Program hit CUDA_ERROR_NOT_FOUND (error 500) due to "not found" on CUDA API call to cuGetProc.'


@pytest.mark.parametrize("ranks", RANKS)
def test_the_case_fills_its_ring_more_than_once(ranks: int) -> None:
    """Places that are taken twice are what the tools are to see; a change of the ring must not lose them unseen."""
    case, ring = sanitize.recycling(ranks)
    topk_idx = torch.cat([idx.flatten() for idx in inputs.make(case).topk_idx])
    rows = torch.bincount(topk_idx[topk_idx >= 0], minlength=case.shape.experts)
    blocks = -(-rows // BLOCK_M)
    assert all(int(own.sum()) > ring for own in blocks.chunk(ranks))
    assert case.ranks == ranks


@pytest.mark.parametrize(
    ("output", "status", "verdict"),
    [
        (f"{DONE}\n{CLEAN}", 0, Verdict()),
        ("========= ERROR SUMMARY: 3 errors", 1, Verdict(errors=3)),
        (f"{DONE}\n========= ERROR SUMMARY: 1 error", 1, Verdict(errors=1)),
        (f"{API_CALL}\n{DONE}\n========= ERROR SUMMARY: 1 error", 1, Verdict(api_calls=1)),
        (f"{API_CALL}\n========= ERROR SUMMARY: 2 errors", 1, Verdict(errors=1, api_calls=1)),
        ("", 1, Verdict(refusal="no output (exit status 1)")),
        (CLEAN, 1, Verdict(refusal="========= ERROR SUMMARY: 0 errors (exit status 1)")),
        (
            f"EnvironmentMissing: no CUDA device\n{CLEAN}",
            1,
            Verdict(refusal="EnvironmentMissing: no CUDA device (exit status 1)"),
        ),
        (
            "========= Error: Target application terminated before first instrumented API call",
            255,
            Verdict(
                refusal="Error: Target application terminated before first instrumented API call (exit status 255)"
            ),
        ),
    ],
    ids=["clean", "errors", "late", "api", "both", "silent", "cut short", "no device", "no call"],
)
def test_a_run_that_did_not_end_is_no_proof(output: str, status: int, verdict: Verdict) -> None:
    assert sanitize.read(output, status) == verdict
