"""`python -m reference explain`: what it derives is the layer's y, and every number on the way is the trace's."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from megaproof.cases import inputs
from megaproof.cases.cases import GATE, Case, find
from megaproof.proof import bundle
from megaproof.proof.divergence import first_divergence
from megaproof.proof.explain import anatomy, derive
from megaproof.proof.explain.derive import ExplainError, Explanation, Question
from megaproof.quant import atoms
from megaproof.quant.recipe import RECIPES
from megaproof.quant.shapes import SHAPES
from megaproof.reference import __main__ as command
from megaproof.reference.layer import LayerResult, moe_layer
from megaproof.reference.stages import SHOWN, STAGES

RECIPE_CASES = [Case(SHAPES["smoke"], (7, 4), recipe) for recipe in RECIPES.values()]
MASKED = find("smoke-r2-t5-clamp10-fast1-zipf-mask30")
SAMPLE = 2
"""Elements explained of each recipe."""


@functools.cache
def layer(case: Case) -> tuple[inputs.Inputs, LayerResult]:
    made = inputs.make(case)
    return made, moe_layer(case.recipe, *made.arguments(), trace=True, experts=case.shape.experts)


def explained(case: Case, question: Question) -> Explanation:
    return derive.explain(case.recipe, *layer(case)[0].arguments(), question, experts=case.shape.experts)


def shown(value: Tensor) -> str:
    return anatomy.hexadecimal(value)


def check_numbers(case: Case, question: Question, found: Explanation) -> int:
    """Every printed stage value against the trace; returns how many slots were shown."""
    made, result = layer(case)
    assert result.trace is not None
    y = result.y[question.rank][question.token, question.column]
    assert found.holds
    assert found.verdict == f"equals y[{question.rank}][{question.token}, {question.column}] of the layer: {shown(y)}"
    rows = result.trace["rows"].tolist()
    slots = [k for k, e in enumerate(made.topk_idx[question.rank][question.token].tolist()) if e >= 0]
    for k in slots:
        row = rows.index([question.rank, question.token, k])
        assert found.value(f"combine{k}.slot").bits == shown(result.trace["slots"][row, question.column])
        title = next(s.title for s in found.sections if s.title.startswith(f"Slot {k}, activation"))
        j = int(title.rsplit(" ", 1)[1])
        group = j // case.recipe.activation_granularity
        assert found.value(f"slot{k}.l2_acts").bits == shown(result.trace["l2_acts"][row, j])
        assert found.value(f"slot{k}.l2_acts_sf").bits == shown(result.trace["l2_acts_sf"][row, group])
        assert found.value(f"slot{k}.slots").bits == found.value(f"combine{k}.slot").bits
        assert found.value(f"slot{k}.weight").bits == shown(made.topk_weights[question.rank][question.token, k])
    assert found.value("y").bits == shown(y)
    return len(slots)


@pytest.mark.parametrize("recipe_case", RECIPE_CASES, ids=list(RECIPES))
def test_what_is_derived_is_the_layer_in_every_recipe(recipe_case: Case) -> None:
    chance = random.Random(recipe_case.id)
    slots = 0
    for rank in range(SAMPLE):
        question = Question(rank, chance.randrange(4), chance.randrange(512), full=rank == 0)
        slots += check_numbers(recipe_case, question, explained(recipe_case, question))
    assert slots == SAMPLE * recipe_case.shape.topk


def test_a_full_size_case() -> None:
    """One element of the first gate case; its layer is computed for that token alone."""
    case = GATE[0]
    made = inputs.make(case)
    found = derive.explain(case.recipe, *made.arguments(), Question(3, 2, 4077), experts=case.shape.experts)
    assert found.holds
    assert len([s for s in found.sections if s.title.startswith("Slot ")]) == 4 * case.shape.topk
    e = made.topk_idx[3][2, 0]
    assert f"expert {int(e)}" in found.sections[0].lines[0].what


@pytest.mark.parametrize("token", range(5))
def test_the_answer_does_not_hide_special_tokens(token: int) -> None:
    """Hot rows past the clamp, spread codes, a zero row, subnormals; masked slots on the way."""
    check_numbers(MASKED, Question(0, token, 100), explained(MASKED, Question(0, token, 100)))


def test_the_whole_batch_gives_the_same_answer() -> None:
    arguments = layer(MASKED)[0].arguments()
    found = derive.explain(MASKED.recipe, *arguments, Question(1, 2, 9), experts=16, whole=True)
    assert found.holds
    assert found.y.item() == explained(MASKED, Question(1, 2, 9)).y.item()


def test_a_token_without_slots_is_plus_zero() -> None:
    made, _ = layer(MASKED)
    masked = [torch.full_like(idx, -1) for idx in made.topk_idx]
    arguments = (made.x, made.x_sf, masked, made.topk_weights, made.weights)
    found = derive.explain(MASKED.recipe, *arguments, Question(0, 1, 5), experts=16)
    assert found.holds
    assert found.value("y").bits == "0x0000"
    assert [section.title.split()[0] for section in found.sections] == ["Dispatch", "Combine"]


def test_equations_come_in_their_order() -> None:
    """Of one slot: Eq. (1) to (8), each section with its tag."""
    found = explained(RECIPE_CASES[0], Question(0, 1, 7, slot=2))
    assert [section.equation for section in found.sections] == [
        "Eq. (1)",
        "Eq. (2), Eq. (3)",
        "Eq. (4)",
        "Eq. (5)",
        "Eq. (6), Eq. (7)",
        "Eq. (8)",
    ]
    gemm1, gemm2 = found.sections[1], found.sections[4]
    assert len([line for line in gemm1.lines if line.what.startswith("gate k ")]) == 4
    assert len([line for line in gemm2.lines if line.what.startswith("out k ")]) == 2
    assert len([line for line in gemm2.lines if line.what.startswith("out sum after")]) == 4


def test_a_chosen_block_and_column_are_the_ones_shown() -> None:
    found = explained(RECIPE_CASES[0], Question(0, 1, 7, slot=0, k_block=3, activation=200))
    titles = [section.title for section in found.sections]
    assert "Slot 0, GEMM 1: activation column 200, K block 3" in titles
    assert "Slot 0, re-quantisation: columns 192..255" in titles
    assert "Slot 0, GEMM 2: column 7, block 3 of 64" in titles


@pytest.mark.parametrize(
    ("question", "says"),
    [
        (Question(2, 0, 0), r"rank = 2 must be in \[0, 2\)"),
        (Question(-1, 0, 0), r"rank = -1"),
        (Question(0, 5, 0), r"token = 5 must be in \[0, 5\) \(of rank 0, which has 5 tokens\)"),
        (Question(0, 0, 512), r"column = 512 must be in \[0, 512\)"),
        (Question(0, 0, 0, slot=4), r"slot = 4"),
        (Question(0, 0, 0, k_block=4), r"k-block = 4"),
        (Question(0, 1, 0, activation=256), r"activation = 256"),
    ],
)
def test_what_does_not_exist_is_named(question: Question, says: str) -> None:
    with pytest.raises(ExplainError, match=says):
        explained(MASKED, question)


def test_a_masked_slot_is_named() -> None:
    rank, token, slot = (int(i) for i in (torch.stack(layer(MASKED)[0].topk_idx) < 0).nonzero()[0])
    with pytest.raises(ExplainError, match=f"slot {slot} of token {token} of rank {rank} is masked"):
        explained(MASKED, Question(rank, token, 0, slot=slot))


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command.app, ["explain", *map(str, arguments)])


def test_the_command_ends_with_the_layer() -> None:
    y = layer(MASKED)[1].y[0][1, 7]
    done = run(MASKED.id, "--rank", 0, "--token", 1, "--column", 7)
    assert done.exit_code == 0
    assert done.stdout.strip().endswith(f"equals y[0][1, 7] of the layer: {shown(y)}")
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    told = json.loads(run(MASKED.id, "--rank", 0, "--token", 1, "--column", 7, "--json").stdout)
    assert (told["case"], told["y"], told["holds"]) == (MASKED.id, shown(y), True)
    assert told["sections"][0]["equation"] == "Eq. (1)"


def test_the_command_follows_the_seed() -> None:
    """The suite's --seed moves a case's seed and not its id."""
    one, two = (run(MASKED.id, "--rank", 0, "--token", 1, "--column", 7, "--seed", seed) for seed in (0, 1))
    assert one.exit_code == two.exit_code == 0
    assert one.stdout != two.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no-such-case", "--rank", 0, "--token", 0, "--column", 0], "no case 'no-such-case'; closest:"),
        (["", "--rank", 0, "--token", 0, "--column", 0], "no case ''; closest:"),
        ([MASKED.id, "--rank", 0, "--token", 99, "--column", 0], "token = 99"),
        ([MASKED.id, "--rank", 0], "--token, --column must be given"),
        ([MASKED.id, "--expert", 16], "expert = 16"),
        (["nowhere.json"], "no bundle 'nowhere.json'"),
        (["nowhere.json", "--rank", 1], "it takes no --rank"),
    ],
)
def test_usage_is_status_2(arguments: list[object], says: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert says in " ".join(done.output.replace("│", " ").split())


def test_a_derivation_that_is_not_the_layer_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object, **keywords: object) -> LayerResult:
        result = moe_layer(*arguments, **keywords)
        return LayerResult([part + 1 for part in result.y], result.stats)

    monkeypatch.setattr(derive, "moe_layer", wrong)
    done = run(MASKED.id, "--rank", 0, "--token", 1, "--column", 7)
    assert done.exit_code == 1
    assert "but y[0][1, 7] of the layer is" in done.stdout


def test_two_ways_that_differ_are_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The readable atom of the promotion is wrong: the first sum by hand is not the twin's."""
    monkeypatch.setattr(atoms, "fma", lambda a, b, c: a * b - c)
    done = run(MASKED.id, "--rank", 0, "--token", 1, "--column", 7)
    assert done.exit_code == 1
    assert "Disagreement" in done.output


def test_statistics_are_counted() -> None:
    done = run(MASKED.id, "--expert", 3)
    count = int(layer(MASKED)[1].stats[0][3])
    assert done.exit_code == 0
    assert f"count {count}" in done.stdout
    assert done.stdout.strip().endswith(f"equals stats[0][3] of the layer: 0x{count:08x}")


# --- bundles ----------------------------------------------------------------------------------------------------------


def leave(stage: str, folder: Path, case: Case = MASKED) -> Path:
    """The bundle of a run whose middle element of a stage has a wrong last bit."""
    made, result = layer(case)
    assert result.trace is not None
    wrong = {name: result.trace[name].clone() for name in STAGES}
    flat = wrong[stage].reshape(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[wrong[stage].element_size()])
    flat[len(flat) // 2] ^= 1
    y, stats = wrong.pop("y").split(list(case.tokens)), wrong.pop("stats").split(16 // case.ranks)
    divergence = first_divergence(result, wrong, list(y), list(stats), case, topk_idx=made.topk_idx)
    assert divergence is not None
    return bundle.write(divergence, case, folder)


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_difference_of_a_bundle_is_derived(stage: str, tmp_path: Path) -> None:
    path = leave(stage, tmp_path)
    left = bundle.read(path)
    done = run(path)
    assert done.exit_code == 0, done.output
    width = 2 * left.rows["expected"].element_size()
    expected, actual = f"0x{left.expected_bits:0{width}x}", f"0x{left.actual_bits:0{width}x}"
    assert f"stage {stage}: derived here {expected}, as the bundle expects; the kernel gave {actual}" in done.stdout
    if stage.startswith("l2"):
        width = 1 if stage == "l2_acts" else 64
        assert f"activation column {left.place['column'] * width}" in done.stdout
    assert json.loads(run(path, "--json").stdout)["holds"] is True


def test_a_bundle_of_other_inputs_is_status_1(tmp_path: Path) -> None:
    """Its case is edited to another seed: what is derived is no longer what it expects."""
    path = leave("l2_acts", tmp_path)
    entry = json.loads(path.read_text())
    entry["case"]["seed"] += 1
    path.write_text(json.dumps(entry))
    done = run(path)
    assert done.exit_code in (1, 2)
    assert "but the bundle expects" in done.stdout or "masked" in done.output


def test_a_damaged_bundle_is_status_1(tmp_path: Path) -> None:
    path = leave("slots", tmp_path)
    path.with_suffix(".safetensors").write_bytes(b"no tensors")
    done = run(path)
    assert done.exit_code == 1
    assert "is damaged" in done.output


def test_the_command_of_a_report_works(tmp_path: Path) -> None:
    """Every divergence ends with a command; it is one that runs."""
    made, result = layer(MASKED)
    assert result.trace is not None
    for stage in SHOWN:
        wrong = {name: result.trace[name].clone() for name in SHOWN}
        wrong[stage].reshape(-1).view(torch.uint8)[-1] ^= 1
        divergence = first_divergence(result, wrong, result.y, result.stats, MASKED, topk_idx=made.topk_idx)
        assert divergence is not None
        words = divergence.explain.split()
        assert words[:4] == ["python", "-m", "reference", "explain"]
        assert run(*words[4:]).exit_code == 0
