"""The kernel's own sources on a CPU, against the reference, bit for bit; and faults in them, each convicted.

A seed decides who goes on and when copies land, so a wait that is missing shows in some of them. Needs a C++ compiler.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megaproof.cases.cases import SMOKE, Case
from megaproof.cases.compare import same
from megaproof.cases.inputs import Inputs
from megaproof.kernel import emulator
from megaproof.kernel.programs.moe import moe
from megaproof.proof import exact
from megaproof.proof.adapters import Prepared
from megaproof.proof.adapters.emulated import EmulatedAdapter
from megaproof.proof.faults import catalogue, delays, source, source_values
from megaproof.proof.faults.source import narrow, replaced
from megaproof.proof.guards import GuardedEmulatedAdapter
from megaproof.proof.prove import Convicted, Proof, prove
from megaproof.quant.shapes import Shape
from megaproof.reference.layer import LayerResult
from megaproof.tests.support import problems
from megaproof.toolchain import files
from megaproof.toolchain.errors import EnvironmentMissing

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler is on PATH (g++ or clang++)")


def proof(case: Case, ring: int | None = None, **run: object) -> Proof:
    problem, expected = prepared(case)
    integers = exact.of_case(case, problem.inputs) if exact.on_lattice(case) else None
    return prove(GuardedEmulatedAdapter(ring, emulator.Run(**run)), problem, expected, integers=integers)


def prepared(case: Case) -> tuple[Prepared, LayerResult]:
    return problems.prepared(case, "cpu")


CASES = [case for case in SMOKE if EmulatedAdapter().claims(case.recipe) is None and case.ranks < 8]
LATTICE = tuple(case for case in CASES if case.family == "lattice")
PER_128 = tuple(dataclasses.replace(case, recipe=case.recipe.replace(activation_granularity=128)) for case in LATTICE)


@pytest.mark.parametrize(
    "case",
    dict.fromkeys((*CASES[:: len(CASES) // 6], *LATTICE, *PER_128, *source_values.EDGES.values())),
    ids=lambda case: case.id,
)
def test_every_stage_of_a_case_equals_the_reference(case: Case) -> None:
    """Of lattice cases y equals int64 arithmetic too, and no guard is written."""
    done = proof(case, seed=len(case.id))
    assert done.elements > 0
    assert done.launches == 3
    assert bool(done.by_integers) == exact.on_lattice(case)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("case", "ring"),
    [
        (narrow(60, (130,)), 48),
        (narrow(60, (130,)), None),
        (narrow(40, (48, 33)), None),
        (narrow(2, (150,), activation_granularity=128), None),
        (narrow(60, (130,), activation_granularity=128), 48),
        (narrow(6, (0, 9, 70), topk=3, silu="precise", clamp=None, activation_granularity=128), None),
        (narrow(2, (150,)), None),
        (narrow(2, (513,)), None),
        (narrow(6, (0, 9, 70), topk=3, silu="precise", clamp=None), None),
    ],
    ids=["recycled", "full", "ranks", "per128", "per128_recycled", "per128_uneven", "rows", "announced", "uneven"],
)
def test_no_interleaving_changes_a_bit(case: Case, ring: int | None, seed: int) -> None:
    proof(case, ring, seed=seed, blocks=1 + seed % 3)


def test_launches_with_and_without_a_meeting_on_one_buffer() -> None:
    """A rank alone with 513 tokens of two slots meets before rows travel, with 512 it does not: in any order, both."""
    case = narrow(2, (514,))
    problem, expected = prepared(case)
    adapter = EmulatedAdapter(run=emulator.Run(seed=5, blocks=3))
    for tokens in (513, 512, 514, 0, 1, 513, 512, 512, 514):
        parts = [[tensor[:tokens] for tensor in part] for part in problem.inputs.arguments()[:4]]
        case = dataclasses.replace(case, tokens=(tokens,))
        adapter.prepare(dataclasses.replace(problem, case=case, inputs=Inputs(*parts, problem.inputs.weights)))
        adapter.fill(0xFF)
        adapter.launch()
        same(f"y of {tokens} tokens", expected.y[0][:tokens], adapter.y()[0])


@pytest.mark.parametrize("case", SMOKE[:2], ids=lambda case: case.id)
def test_an_index_of_no_expert_is_an_empty_slot(case: Case) -> None:
    """With check = False nobody looks at indices before the launch: one outside [0, E) must lead nowhere."""
    problem, _ = prepared(case)
    strange = torch.tensor([case.shape.experts, -2, 1 << 40, -(1 << 40), (1 << 32) + 1])
    found = []
    for instead in (torch.full_like(strange, -1), strange):
        topk_idx = [idx.clone() for idx in problem.inputs.topk_idx]
        for idx in topk_idx:
            count = len(idx[::2, 0])
            idx[::2, 0] = instead.repeat(-(-count // len(instead)))[:count]
        changed = dataclasses.replace(problem, inputs=dataclasses.replace(problem.inputs, topk_idx=topk_idx))
        adapter = EmulatedAdapter()
        adapter.prepare(changed)
        adapter.fill(0xFF)
        adapter.launch()
        found.append([*adapter.y(), *adapter.stats()])
    for empty, outside in zip(*found, strict=True):
        assert torch.equal(empty.view(torch.int16), outside.view(torch.int16))


def test_a_role_that_waits_in_vain_says_so() -> None:
    def nobody_pulls(text: str) -> str:
        return replaced(text, "} else if (warp_idx <= kNumDispatchWarps) {", "} else if (warp_idx == 9) {")

    with pytest.raises(emulator.EmulationError, match=r"scout waited for rows of a pool block: expected \d+, saw 0"):
        proof(narrow(2, (3,)), change=nobody_pulls, timeout_steps=200_000)


@pytest.mark.parametrize("absent", range(3))
@pytest.mark.parametrize(
    ("tokens", "before"),
    [
        (513, "phase::mark(params, phase::kPhases);"),
        (5, "combine::Units units(rank);"),
        (513, "combine::Units units(rank);"),
    ],
    ids=["before_rows_travel", "at_the_end", "at_the_end_after_a_meeting"],
)
def test_a_missing_block_is_what_the_others_wait_for(tokens: int, before: str, absent: int) -> None:
    def goes_away(text: str) -> str:
        return replaced(text, before, f"if (rank.cta_idx == {absent}) return; {before}")

    with pytest.raises(emulator.EmulationError, match="waited for thread blocks of the rank: expected 3, saw 2"):
        proof(narrow(2, (tokens,)), change=goes_away, timeout_steps=200_000, blocks=3)


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        ("rank.idx == 1", "rank 0, thread block ., all roles waited for ranks: expected 2, saw 1"),
        (
            "rank.idx == 1 && rank.cta_idx == 0",
            "rank 0, thread block ., all roles waited for ranks: expected 2, saw 1"
            "|rank 1, thread block 1, all roles waited for thread blocks of the rank: expected 2, saw 1",
        ),
    ],
    ids=["rank", "block_of_a_rank"],
)
def test_who_is_missing_at_a_meeting_of_ranks(absent: str, said: str) -> None:
    """A whole rank sees that another one is missing, that one how many of its blocks: the first to give up speaks."""

    def goes_away(text: str) -> str:
        return replaced(text, "phase::mark(params, phase::kPhases);", f"if ({absent}) return;")

    with pytest.raises(emulator.EmulationError, match=said):
        proof(narrow(4, (5, 3)), change=goes_away, timeout_steps=200_000)


@pytest.mark.parametrize("lost", delays.LOST, ids=lambda lost: lost.id)
def test_who_waits_for_a_copy_that_does_not_come_says_so(lost: delays.Lost) -> None:
    deep = Shape("deep", hidden=1536, intermediate=128, experts=2, topk=2)  # more stages than the ring has
    with pytest.raises(emulator.EmulationError, match=lost.says):
        proof(Case(deep, (3,)), change=lost.change, timeout_steps=200_000, early=True)


@pytest.mark.parametrize("case", [narrow(2, (5,)), narrow(2, (513,)), narrow(4, (5, 3))], ids=lambda case: case.id)
def test_a_launch_after_a_failure_computes_nothing(case: Case) -> None:
    """Until somebody has looked at the status, whether its blocks meet before rows travel or not.

    Nor does it announce rows: lists that grow launch after launch would end in the counters behind them.
    """
    problem, _ = prepared(case)
    adapter = EmulatedAdapter()
    adapter.prepare(problem)
    adapter.fill(0xFF)
    adapter._buffer.status[0] = 1
    first, end = (adapter._buffer.size.offsets()[0][name] for name in ("recv_count", "l1_acts"))
    counters = adapter._buffer.storage[:, first:end]
    before = counters.clone()
    for _ in range(2):
        with pytest.raises(emulator.EmulationError, match="waited for"):
            adapter.launch()
    assert torch.equal(counters, before)
    assert all(bool((y.view(torch.int16) == -1).all()) for y in adapter.y())


# --- faults -----------------------------------------------------------------------------------------------------------


FAULTS = [fault.change for fault in catalogue.of("source") if fault.change not in source_values.OVERWRITES]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_fault_in_the_sources_is_convicted(fault: source.Source) -> None:
    problem = prepared(fault.case)
    emulator.source(change=fault.change)  # a place that is not there is no conviction
    for seed in fault.seeds:
        run = emulator.Run(seed=seed, change=fault.change, timeout_steps=fault.timeout_steps, most_steps=8_000_000)
        try:
            prove(EmulatedAdapter(fault.ring, run), *problem)
        except Convicted as error:
            said = error.check
        except emulator.EmulationError as error:
            said = str(error).partition(": ")[2]
        except AssertionError as error:  # the adapter's own, of rows that are not where they should be
            said = str(error)
        else:
            continue
        print(f"{fault.id}: seed {seed}: {said[:200]}")
        assert re.match(fault.check, said), said
        return
    pytest.fail(f"{fault.id} was not seen with seeds {fault.seeds}")


@pytest.mark.parametrize(
    ("case", "ring"),
    {(fault.case, fault.ring): None for fault in FAULTS},
    ids=lambda value: getattr(value, "id", f"ring_{value}"),
)
def test_the_faults_are_in_sources_that_pass(case: Case, ring: int | None) -> None:
    """And within the time that a role of a faulty one has."""
    assert proof(case, ring, timeout_steps=source.Source.timeout_steps).elements > 0


def test_the_pool_of_registers_is_the_kernels() -> None:
    entries = moe().compile().report.entries.values()
    assert {entry.registers for entry in entries} == {emulator.LAUNCH_REGISTERS}


# --- what is compiled, and where it is kept ---------------------------------------------------------------------------


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4096])


def foreign(path: Path) -> None:
    path.chmod(0o666)
    path.write_bytes(b"of somebody else")


@pytest.mark.parametrize("damage", [damaged, foreign])
def test_a_library_that_is_not_whole_is_compiled_again(
    damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(target: Path) -> None:
        made.append(target)
        target.write_bytes(b"library" * 2000)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = f"{damage.__name__}.so"
    assert emulator._kept(name, make).parent == files.scratch()
    (files.scratch() / name).unlink()  # as in another process
    kept = emulator._kept(name, make)
    assert kept == tmp_path / "megaproof" / "emulator" / name
    assert len(made) == 1
    damage(kept)
    again = emulator._kept(name, make)
    assert len(made) == 2
    assert again.read_bytes() == b"library" * 2000


def test_without_a_cache_a_text_is_compiled_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    tmp_path.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        path = emulator._kept("once.so", lambda target: made.append(target.write_bytes(b"x")))
        assert path == files.scratch() / "once.so"
    assert made == [1]
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_or_room_the_environment_is_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    full = subprocess.CompletedProcess([], 1, "", "fatal error: error writing: No space left on device")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: full)
    with pytest.raises(EnvironmentMissing, match="no space is left in"):
        emulator._compile(["g++"], "the kernel")
    monkeypatch.setattr(emulator, "compiler", lambda: None)
    with pytest.raises(EnvironmentMissing, match=r"the emulator needs g\+\+ or clang\+\+"):
        emulator.library("no text")
