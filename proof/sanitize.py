"""`python -m proof sanitize`: the kernel under the tools of compute-sanitizer, one line a tool and number of ranks.

Exit status: 0 no error, 1 errors or wrong bits, 3 a tool could not run. Errors are those in kernels: torch asks the
driver for entry points that it may lack, and calls that fail for it are no errors of the kernel.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megaproof.toolchain import child

if TYPE_CHECKING:
    from megaproof.cases.cases import Case


TOOLS: dict[str, tuple[str, ...]] = {
    "memcheck": ("--report-api-errors", "no"),
    "synccheck": (),
    "initcheck": (),
}
RANKS = (1, 8)
LIMIT_S = 240
PASSED, WRONG, ENVIRONMENT = 0, 1, 3
DONE = "the kernel's bits are the reference's"

_SUMMARY = re.compile(r"^=+ ERROR SUMMARY: (\d+) error", re.MULTILINE)
_API = re.compile(r"^=+ Program hit \S+ .*on CUDA API call to (\w+)", re.MULTILINE)
_REASON = re.compile(
    r"^(?:=+ (?:Error|Internal|Target|Warning).*|\w+(?:Error|Missing|Timeout|Differs): .*)$", re.MULTILINE
)


@dataclass(frozen=True)
class Verdict:
    """What one run of a tool showed. refusal: why it showed nothing, or ''."""

    errors: int = 0
    api_calls: int = 0
    refusal: str = ""

    def __str__(self) -> str:
        if self.refusal:
            return f"could not run: {self.refusal}"
        calls = f" ({self.api_calls} failed API calls not counted)" if self.api_calls else ""
        return f"{self.errors} error{'' if self.errors == 1 else 's'}{calls}"


def find_sanitizer() -> str | None:
    """On PATH, else in a CUDA toolkit at its usual place, the newest first."""
    toolkits = sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True)
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, toolkits)]))


def read(output: str, returncode: int) -> Verdict:
    """The verdict in the text of a run. A child that did not get to its end is no proof, whatever the tool counted."""
    summary, api_calls = _SUMMARY.search(output), len(_API.findall(output))
    errors = max(0, int(summary[1]) - api_calls) if summary else 0
    if errors or (summary and DONE in output):
        return Verdict(errors, api_calls)
    reasons = [match[0].lstrip("= ") for match in _REASON.finditer(output)]
    lines = output.strip().splitlines()
    return Verdict(refusal=(reasons or lines[-1:] or ["no output"])[-1] + f" (exit status {returncode})")


def run(sanitizer: str, tool: str, ranks: int) -> tuple[Verdict, str]:
    """One tool on one case, and what it printed."""
    # Without torch's cache each tensor is an allocation, so that an access beyond its end is one beyond memory.
    environment = child.environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    command = [sanitizer, "--tool", tool, *TOOLS[tool], *child.command("proof", "sanitize", "--child", str(ranks))]
    with subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool and its child, which holds the pipe
            return Verdict(refusal=f"not done after {LIMIT_S} s"), process.communicate()[0]
    return read(output, process.returncode), output


def verdicts() -> Iterator[Verdict]:
    """Of every tool and number of ranks, printed."""
    sanitizer = find_sanitizer()
    for tool in TOOLS:
        for ranks in RANKS:
            verdict, output = Verdict(refusal="no compute-sanitizer on PATH or in a CUDA toolkit"), ""
            if sanitizer:
                verdict, output = run(sanitizer, tool, ranks)
            print(f"{tool}, {ranks} rank{'' if ranks == 1 else 's'}: {verdict}", flush=True)
            if verdict.errors or (verdict.refusal and output):
                print("\n".join(f"    {line}" for line in output.splitlines()[:60]), flush=True)
            yield verdict


def recycling(ranks: int) -> tuple[Case, int]:
    """(case, ring) of experts of few rows, in a ring of fewer blocks than those of every rank fill."""
    from megaproof.cases.cases import Case
    from megaproof.kernel.host.sizes import WAVE_BLOCKS
    from megaproof.quant.shapes import SHAPES

    ring = 2 * WAVE_BLOCKS
    return Case(dataclasses.replace(SHAPES["smoke"], experts=ranks * (ring + 8)), (60,) * ranks), ring


def sanitized(ranks: int) -> None:
    """The kernel on that case; the reference's side stays on the CPU."""
    import torch

    from megaproof.cases import inputs
    from megaproof.cases.compare import hold, same
    from megaproof.cases.run import run_case
    from megaproof.kernel import api
    from megaproof.proof.adapters import Prepared
    from megaproof.proof.adapters.megaproof import MegaproofAdapter

    case, ring = recycling(ranks)
    run, device = run_case(case, "cpu", trace=False), torch.device("cuda")
    made, wanted = run.inputs, run.result
    hold(all(int((counts > 0).sum()) > ring for counts in wanted.stats), "no place of the ring is taken twice")
    api.TIMEOUT_S = float(LIMIT_S)  # a tool makes everything slower, at most by this
    on_gpu = [[tensor.to(device) for tensor in part] for part in made.arguments()[:4]]

    adapter = MegaproofAdapter(ring)
    adapter.prepare(Prepared(case, inputs.Inputs(*on_gpu, lambda e: made.weights(e).to(device)), device))
    for _ in range(2):  # the second one finds what the first one left behind
        adapter.launch()
        for rank, y in enumerate(adapter.y()):
            same(f"y of rank {rank}", wanted.y[rank], y)
    print(DONE)


def sanitize_command(
    child_ranks: Annotated[int | None, typer.Option("--child", hidden=True, help="Run the kernel alone.")] = None,
) -> None:
    """The kernel under the tools of compute-sanitizer, one line a tool and number of ranks. Needs an SM90 GPU.

    Exit status: 0 clean, 1 a tool reports an error, 3 a tool refuses this device.
    """
    if child_ranks:
        sanitized(child_ranks)
        return
    found = list(verdicts())
    if any(verdict.errors for verdict in found):
        raise typer.Exit(WRONG)
    raise typer.Exit(ENVIRONMENT if any(verdict.refusal for verdict in found) else PASSED)
