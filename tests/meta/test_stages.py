"""A stage is known in one table: no other file lists stages, and a stage that is added there is known everywhere."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from megaproof.reference.stages import STAGES
from megaproof.tests.support.house import files
from megaproof.tests.support.runs import ROOT
from megaproof.toolchain import child

ALLOWED = {
    "reference/stages.py": "the table",
    "reference/layer.py": "the lines that compute each stage",
    "reference/ranks.py": "the same for one rank, whose rows of slots come back to it",
    "reference/arguments.py": "checks the argument stats",
    "reference/layout.py": "predicts the fields of the kernel's buffer",
    "kernel/host/buffer.py": "the fields of the kernel's buffer",
    "kernel/host/checks.py": "checks the argument y",
    "kernel/programs/grouped.py": "parameters of a program",
    "kernel/baseline/pipeline.py": "reads slots from its own buffer",
    "quant/twin_gpu.py": "y is an operand of an fma",
    "proof/adapters/protocol.py": "names the methods y and stats of an adapter",
    "proof/adapters/megaproof.py": "reads slots from the kernel's buffer",
    "proof/divergence/find.py": "takes y and stats by rank",
    "proof/explain/derive.py": "derives these very values, a line each",
    "proof/explain/replay.py": "counts stats by hand",
    "proof/faults/adapters.py": "kernels that are wrong in one stage",
    "proof/faults/hostile.py": "answers with another y",
    "proof/faults/source_values.py": "faults of the sources, and the stage that shows each",
    "proof/faults/traces.py": "errors planted in one stage",
    "proof/gate.py": "computes the rooms again, each from the stage before it",
    "proof/guards.py": "lays guards around y and stats",
    "proof/prove.py": "knows what y and stats of the other launches have to be",
    "proof/worlds/gloo.py": "reads the results y and stats of a rank",
    "proof/worlds/rank_process.py": "writes them",
}
"""File -> why it names a stage. Tests may name any: they look at one."""


def named(source: str) -> set[str]:
    """Stages that stand in the code as a string of their own."""
    return {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)} & set(STAGES)


def sources() -> Iterator[Path]:
    for path in files():
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] != "tests":
            yield path


def test_no_other_file_names_a_stage() -> None:
    found = {str(path.relative_to(ROOT)) for path in sources() if named(path.read_text(encoding="utf-8"))}
    assert found == set(ALLOWED)


def test_a_name_is_found_in_code_and_not_in_prose() -> None:
    assert named('"""l1_acts and y."""\nx = trace["l2_acts"]  # slots') == {"l2_acts"}


NEW_STAGE = """
        Stage(
            name="v",
            equation="Eq. (4) activation",
            format=_always(FP32_VALUES),
            columns="intermediate",
            rows="slot",
            lives="pool",
        ),
        Stage(
            name="l2_acts","""

CHILD = '''
import importlib.util, sys
from pathlib import Path

def edited(name, old, new):
    """The module, from its source with one place changed."""
    spec = importlib.util.find_spec(name)
    source = Path(spec.origin).read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {spec.origin}"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    exec(compile(source.replace(old, new), spec.origin, "exec"), vars(module))
    parent, _, own = name.rpartition(".")
    setattr(sys.modules[parent], own, module)

edited("megaproof.reference.stages", """
        Stage(
            name="l2_acts",""", sys.argv[1])
edited("megaproof.reference.layer", 'made = {"l2_acts"', 'made = {"v": v, "l2_acts"')

import torch
from megaproof.cases.cases import Case
from megaproof.cases.run import run_case
from megaproof.golden import store
from megaproof.proof import bundle, tally
from megaproof.proof.adapters import Prepared
from megaproof.proof.adapters.emulated import EmulatedAdapter
from megaproof.proof.adapters.reference import ReferenceAdapter
from megaproof.proof.explain import replay
from megaproof.proof.faults.adapters import LastBit
from megaproof.proof.prove import Convicted, prove
from megaproof.quant.shapes import Shape
from megaproof.reference.stages import STAGES

case = Case(Shape("small", 128, 256, 4, 2), (5, 3), masked=30)
run = run_case(case, "cpu")
assert list(run.trace) == [*STAGES, "rows"] and list(STAGES)[2] == "v"
stage, rows = STAGES["v"], len(run.trace["rows"])
assert run.trace["v"].shape == (rows, stage.width(case.shape, case.recipe)) == (rows, 256)

prepared = Prepared(case, run.inputs, torch.device("cpu"))
proof = prove(ReferenceAdapter(), prepared, run.result)  # ranks that exchange bytes have it too
assert proof.compared["v"] > 2 * rows * 256 and "v" in proof.shown
assert ", v " in tally.lines(tally.take())[0]
try:
    prove(LastBit("v"), prepared, run.result)
except Convicted as error:
    assert error.check == "v"
    report = error.divergence.report()
    assert "stage v" in report and "Eq. (4) activation" in report and "(fp32)" in report, report
    told = replay.of_bundle(bundle.read(bundle.write(error.divergence, case, Path(sys.argv[2]))))
    assert told.holds, told.verdicts
else:
    raise AssertionError("a wrong last bit of the new stage was not seen")

golden = store.make_entry(case, run.sha256, run.trace, "test", "a stage more")
assert store.check(case, golden, run.sha256, run.trace) > 0 and "v" in golden.entry["stages"]

from megaproof.kernel import emulator
if emulator.compiler():
    proof = prove(EmulatedAdapter(), prepared, run.result, 1)
    assert proof.not_shown == ("v",), "a kernel that does not keep the stage does not show it"
print("known everywhere")
'''


def test_a_new_stage_is_a_row_and_a_line(tmp_path: Path) -> None:
    """Eq. (4)'s values become a stage: one row of the table, one entry where the layer computes them, and nothing else.

    The trace, ranks that exchange bytes, proofs, reports, bundles, explanations, goldens and the tally know it.
    """
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD))
    run = subprocess.run(
        [sys.executable, str(script), NEW_STAGE, str(tmp_path / "bundles")],
        env=child.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "known everywhere", run.stderr
