"""Old names and what they are called now: imports, commands, kernels behind `--kernel`, test files.

Until version 0.1 the folders were imported by their own names (`import kernel.api`). Whoever uses such a name gets one
line that says the new one. docs/migration.md shows these tables, and a test walks them.
"""

from __future__ import annotations

import sys

IMPORTS: dict[str, str] = {
    "quant": "megaproof.quant",
    "reference": "megaproof.reference",
    "reference.anatomy": "megaproof.proof.explain.anatomy",
    "reference.explain": "megaproof.proof.explain.derive",
    "reference.processes": "megaproof.proof.worlds.gloo",
    "reference.rank_process": "megaproof.proof.worlds.rank_process",
    "reference.replay": "megaproof.proof.explain.replay",
    "kernel": "megaproof.kernel",
    "kernel.adapters": "megaproof.proof.adapters",
    "kernel.arguments": "megaproof.kernel.host.checks",
    "kernel.bench": "megaproof.bench",
    "kernel.bench.card": "megaproof.bench.measure.card",
    "kernel.bench.compare": "megaproof.bench.report.compare",
    "kernel.bench.dense_rows": "megaproof.bench.measure.main_loop",
    "kernel.bench.derived": "megaproof.bench.report.derived",
    "kernel.bench.load": "megaproof.bench.measure.load",
    "kernel.bench.plot": "megaproof.bench.report.plot",
    "kernel.bench.points": "megaproof.bench.measure.points",
    "kernel.bench.profiling": "megaproof.bench.measure.profiling",
    "kernel.bench.report": "megaproof.bench.report.page",
    "kernel.bench.results": "megaproof.bench.report.results",
    "kernel.bench.rows": "megaproof.bench.measure.rows",
    "kernel.bench.sections": "megaproof.bench.report.sections",
    "kernel.bench.sweep": "megaproof.bench.measure.sweep",
    "kernel.bench.targets": "megaproof.bench.report.targets",
    "kernel.bench.timer": "megaproof.bench.measure.timer",
    "kernel.bench.yardsticks": "megaproof.bench.measure.yardsticks",
    "kernel.build": "megaproof.toolchain.build",
    "kernel.config": "megaproof.kernel.host.sizes",
    "kernel.dense": "megaproof.kernel.programs.dense",
    "kernel.floor": "megaproof.bench.model.floor",
    "kernel.grouped": "megaproof.kernel.programs.grouped",
    "kernel.launch": "megaproof.toolchain.launch",
    "kernel.params": "megaproof.kernel.host.params",
    "kernel.phases": "megaproof.bench.measure.phases",
    "kernel.probe": "megaproof.kernel.programs.probe",
    "kernel.roofline": "megaproof.bench.model.roofline",
    "kernel.sass": "megaproof.toolchain.sass",
    "kernel.stream": "megaproof.kernel.programs.stream",
    "kernel.symm": "megaproof.kernel.host.buffer",
    "kernel.tiles": "megaproof.kernel.host.weights",
    "golden": "megaproof.golden",
    "golden.atomic": "megaproof.toolchain.files",
    "tests": "megaproof.tests",
    "tests.adversarial": "megaproof.cases.inputs.adversarial",
    "tests.bad_chains": "megaproof.tests.support.bad_chains",
    "tests.bit_patterns": "megaproof.tests.support.bit_patterns",
    "tests.bundle": "megaproof.proof.bundle",
    "tests.cases": "megaproof.cases.cases",
    "tests.command_line": "megaproof.tests.support.command_line",
    "tests.compare": "megaproof.cases.compare",
    "tests.coverage": "megaproof.proof.coverage",
    "tests.delayed": "megaproof.proof.faults.delays",
    "tests.divergence": "megaproof.proof.divergence",
    "tests.divergence.formats": "megaproof.quant.stored",
    "tests.draws": "megaproof.cases.inputs.draws",
    "tests.emulated": "megaproof.proof.emulated",
    "tests.exact": "megaproof.proof.exact",
    "tests.fake_call": "megaproof.tests.support.fake_call",
    "tests.families": "megaproof.cases.inputs.families",
    "tests.inputs": "megaproof.cases.inputs",
    "tests.interpreted": "megaproof.tests.support.interpreted",
    "tests.kernel_proof": "megaproof.proof.prove",
    "tests.lattice": "megaproof.cases.inputs.lattice",
    "tests.memory": "megaproof.proof.memory",
    "tests.meta.runs": "megaproof.tests.support.runs",
    "tests.meta.wrong": "megaproof.proof.faults.adapters",
    "tests.oracle_cases": "megaproof.tests.support.oracle_cases",
    "tests.pairwise": "megaproof.cases.pairwise",
    "tests.planted": "megaproof.proof.faults.traces",
    "tests.position": "megaproof.cases.inputs.position",
    "tests.problems": "megaproof.tests.support.problems",
    "tests.redzones": "megaproof.proof.guards",
    "tests.sanitize": "megaproof.proof.sanitize",
    "tests.sizes": "megaproof.tests.support.sizes",
    "tests.speed": "megaproof.bench.measure.twins",
    "tests.swiglu_rows": "megaproof.tests.support.swiglu_rows",
    "tests.tally": "megaproof.proof.tally",
    "tests.threads": "megaproof.tests.support.threads",
    "tests.tiny": "megaproof.tests.support.tiny",
    "tests.verdicts": "megaproof.proof.verdicts",
}
"""Modules. One that is not here moved with the longest name above it that is."""

NAMES: dict[str, str] = {
    "kernel.build.BuildError": "megaproof.toolchain.errors.BuildError",
    "kernel.build.EnvironmentMissing": "megaproof.toolchain.errors.EnvironmentMissing",
    "kernel.build.PINS": "megaproof.kernel.programs.PINS",
    "kernel.build.gate": "megaproof.toolchain.gate.check_report",
    "kernel.config.Problem": "megaproof.kernel.host.buffer.BufferSize",
    "kernel.launch.LaunchError": "megaproof.toolchain.errors.LaunchError",
    "kernel.sass.faults": "megaproof.toolchain.gate.sass_faults",
    "kernel.symm.KernelTimeout": "megaproof.kernel.host.timeout.KernelTimeout",
    "kernel.symm.SymmBuffer": "megaproof.kernel.host.symm_buffer.SymmBuffer",
    "kernel.symm.VirtualGroup": "megaproof.kernel.host.groups.VirtualGroup",
    "quant.recipe.SHAPES": "megaproof.quant.shapes.SHAPES",
    "quant.recipe.Shape": "megaproof.quant.shapes.Shape",
    "quant.recipe.shape": "megaproof.quant.shapes.shape",
}
"""What moved out of a module that kept its other names."""

COMMANDS: dict[str, str] = {
    "python -m kernel bench": "python -m bench sweep",
    "python -m kernel dense": "python -m bench dense",
    "python -m kernel floor": "python -m bench floor",
    "python -m kernel phases": "python -m bench phases",
    "python -m kernel report": "python -m bench report",
    "python -m reference.processes": "python -m proof gloo",
    "python -m tests.delayed": "python -m proof delays",
    "python -m tests.emulated": "python -m proof emulate",
    "python -m tests.meta.wrong": "python -m proof wrong",
    "python -m tests.sanitize": "python -m proof sanitize",
    "python -m tests.speed": "python -m bench twins",
}
"""Whatever else README.md showed as a command of `kernel`, `golden` and `reference` is the same as it was."""

KERNELS: dict[str, str] = {
    "kernel.adapters.baseline:make": "megaproof.proof.adapters.baseline:make",
    "kernel.adapters.emulated:make": "megaproof.proof.adapters.emulated:make",
    "kernel.adapters.megaproof:make": "megaproof.proof.adapters.megaproof:make",
    "kernel.adapters.reference:make": "megaproof.proof.adapters.reference:make",
    "kernel.adapters:default": "megaproof.proof.adapters:default",
}
"""What `--kernel` takes."""

TESTS: dict[str, str] = {
    "tests/test_bench_points.py": "tests/bench/test_points.py",
    "tests/test_config.py": "tests/kernel/host/test_sizes.py",
    "tests/test_emulator.py": "tests/kernel/test_emulator.py",
    "tests/test_progress.py": "tests/reference/test_progress.py",
    "tests/test_scheduler.py": "tests/reference/test_scheduler.py",
    "tests/test_silicon.py": "tests/golden/test_silicon.py",
}
"""Test files that README.md and CONTRIBUTING.md named; the others moved in the same way, into the folder of what they
test."""


def new_name(old: str) -> str | None:
    """What the module `old` is called now, by the longest name above it that the table holds; None if there is none."""
    head = old
    while head and head not in IMPORTS:
        head = head.rpartition(".")[0]
    return IMPORTS[head] + old[len(head) :] if head else None


def of_import(old: str) -> str | None:
    """One line on the old module `old`: its new name, and the names that moved out of it. None if it is no old name."""
    new = new_name(old)
    if new is None:
        return None
    line = f"{old} is {new} now"
    if any(name.startswith(f"{old}.") for name in IMPORTS) and "." in old:
        line += " (its modules: docs/migration.md)"
    return line + "".join(f", {name} is {NAMES[name]}" for name in NAMES if name.rpartition(".")[0] == old)


def of_command(words: str) -> str | None:
    """One line on an old command, such as 'python -m kernel bench'; None if it is no old one."""
    return f"{words} is {COMMANDS[words]} now" if words in COMMANDS else None


def of_kernel(spec: str) -> str | None:
    """One line on an old spelling of `--kernel`; None if it is no old one."""
    module, colon, factory = spec.partition(":")
    if spec in KERNELS:
        return f"--kernel {spec} is --kernel {KERNELS[spec]} now"
    return f"--kernel {spec} is --kernel {IMPORTS[module]}:{factory} now" if colon and module in IMPORTS else None


def of_test(path: str) -> str | None:
    """One line on a test file that moved, given as `pytest` takes it; None if it is no old one."""
    file = path.partition("::")[0]
    return f"{file} is {TESTS[file]} now" if file in TESTS else None


def refuse_old_command(module: str) -> None:
    """Ends the process with status 2 and one line if its first argument is an old command of `python -m module`."""
    if line := of_command(f"python -m {module} {' '.join(sys.argv[1:2])}"):
        print(line, file=sys.stderr)
        raise SystemExit(2)
