"""README: its Python runs as it is written, and it stays short."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megaproof.tests.support.runs import ROOT

README = (ROOT / "README.md").read_text()
LINES = 150
"""README is read on the way to somewhere else; what is longer belongs to docs/."""
PREDICTED, LAUNCHED = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def run(*blocks: str) -> dict[str, Any]:
    """The names that the blocks leave, run one after the other in one namespace."""
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    return names


def test_the_prediction_runs_as_written() -> None:
    names = run(PREDICTED)
    result, case = names["result"], names["case"]
    assert result.y[0].shape == (case.tokens[0], case.shape.hidden)
    assert result.trace["l2_acts"].shape[1] == case.shape.intermediate


def test_the_arguments_of_the_call_are_made_as_written() -> None:
    """On a CPU: all of the call but the buffer, what is written to it, and the launch."""
    wanted = ("import", "experts =", "w1, w1_sf", "fp8 =", "l1, l2 =")
    lines = [line.replace(".cuda()", "") for line in LAUNCHED.splitlines() if line.startswith(wanted)]
    names = run(PREDICTED, "from megaproof.kernel.api import transform_weights_for_mega_moe_sm90", "\n".join(lines))
    assert [weights.shape for weights, _ in (names["l1"], names["l2"])] == [(16, 512, 512), (16, 512, 256)]


@pytest.mark.gpu
def test_the_kernel_is_called_as_written() -> None:
    """It ends in an assertion of its own: the kernel's y is the predicted one."""
    assert "assert torch.equal(y.cpu(), result.y[0])" in LAUNCHED
    run(PREDICTED, LAUNCHED)


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= LINES
