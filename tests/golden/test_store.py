"""The life of a golden: written whole, read with its digest, and two failures that are not to be mistaken."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megaproof.cases.cases import CASES, GATE, SMOKE, Case
from megaproof.cases.run import run_case
from megaproof.golden import __main__ as cli
from megaproof.golden import store
from megaproof.quant.recipe import Recipe
from megaproof.reference.stages import STAGES

CASE = next(case for case in SMOKE if case.ranks == 1)
"""The smallest case with a trace."""


@pytest.fixture(scope="module")
def computed() -> tuple[str, dict[str, torch.Tensor]]:
    run = run_case(CASE)
    return run.sha256, run.trace


@pytest.fixture
def folder(tmp_path: Path, computed: tuple[str, dict[str, torch.Tensor]]) -> Path:
    store.write({CASE.id: store.make_entry(CASE, *computed, "test", "a reason")}, folder=tmp_path)
    return tmp_path


def changed(trace: dict[str, torch.Tensor], stage: str, row: int = 3) -> dict[str, torch.Tensor]:
    """The trace with the last bit of one element changed."""
    tensor = trace[stage].clone()
    raw = tensor.view(torch.uint8) if tensor.dim() > 1 else tensor.view(torch.uint8).unsqueeze(0)
    raw[row if tensor.dim() > 1 else 0, 0] ^= 1
    return {**trace, stage: tensor}


def test_the_committed_goldens_cover_the_cases() -> None:
    assert set(store.read_manifest()) == {case.id for case in CASES if case.tier == "cpu"}


@pytest.mark.parametrize("case", GATE + SMOKE, ids=lambda case: case.id)
def test_every_golden_is_whole_and_of_its_recipe(case: Case) -> None:
    golden = store.read(case)
    assert golden.entry["recipe"] == case.recipe.fields()
    assert Recipe.from_fields(golden.entry["recipe"]).recipe_id == golden.entry["recipe_id"]
    assert set(golden.entry["stages"]) == set(golden.data) == set(STAGES)
    assert golden.entry["reason"]
    if golden.entry["data"] == "stages":
        assert {name: store.stage_digest(data) for name, data in golden.data.items()} == golden.entry["stages"]


def test_a_golden_survives_its_storage(folder: Path, computed: tuple[str, dict[str, torch.Tensor]]) -> None:
    sha256, trace = computed
    compared = store.check(CASE, store.read(CASE, folder), sha256, trace)
    assert compared == sum(trace[name].numel() * trace[name].element_size() for name in STAGES)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "row-digests"])
def test_one_bit_in_any_stage_is_found_and_placed(
    stage: str, whole: bool, computed: tuple[str, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256, trace = computed
    if not whole:
        monkeypatch.setattr(store, "WHOLE_TRACE_BYTES", 0)
    golden = store.make_entry(CASE, sha256, trace, "test", "a reason")
    assert golden.entry["data"] == ("stages" if whole else "row digests")
    with pytest.raises(store.OtherBytes, match="same recipe, other bytes") as caught:
        store.check(CASE, golden, sha256, changed(trace, stage))
    message = str(caught.value)
    assert f"stage {stage}:" in message
    assert CASE.id in message
    if stage == "y":
        assert "1 of 5 rows differ, first token row 3" in message
    elif stage != "stats":
        assert f"(rank, token, slot) {tuple(trace['rows'][3].tolist())}" in message


def test_another_number_of_rows_is_named(computed: tuple[str, dict[str, torch.Tensor]]) -> None:
    sha256, trace = computed
    golden = store.make_entry(CASE, sha256, trace, "test", "a reason")
    with pytest.raises(store.OtherBytes, match="another number of rows"):
        store.check(CASE, golden, sha256, {**trace, "slots": trace["slots"][:-1]})


def test_other_inputs_are_not_blamed_on_the_layer(computed: tuple[str, dict[str, torch.Tensor]]) -> None:
    sha256, trace = computed
    golden = store.make_entry(CASE, sha256, trace, "test", "a reason")
    with pytest.raises(store.OtherBytes, match="the generator changed"):
        store.check(CASE, golden, "0" * 64, trace)


def test_a_changed_recipe_is_a_failure_of_its_own(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    other = CASE.recipe.replace(clamp=7.0)
    manifest["cases"][CASE.id] |= {"recipe": other.fields(), "recipe_id": other.recipe_id}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(store.RecipeChanged, match=r"recipe changed, goldens stale.*clamp: 7.0 -> 10.0"):
        store.read(CASE, folder)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: next((folder / "data").iterdir()).unlink(), "is missing"),
        (lambda folder: _flip(next((folder / "data").iterdir())), "is damaged: its sha256 is not the manifest's"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text('{"cases": {}}'), f"no golden for {CASE.id}"),
    ],
    ids=["no-file", "bit-flip", "no-manifest", "no-json", "no-entry"],
)
def test_a_missing_or_damaged_golden_is_named(folder: Path, damage: object, message: str) -> None:
    damage(folder)
    with pytest.raises(store.GoldenError, match=message):
        store.read(CASE, folder)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# --- the command line -------------------------------------------------------------------------------------------------


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture
def only(folder: Path) -> list[str]:
    """Arguments that restrict a command to the one case of the folder."""
    return ["--only", CASE.id, "--folder", str(folder)]


def rewrite(folder: Path, **entry: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["cases"][CASE.id].update(entry)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_verify_proves_a_true_golden(only: list[str]) -> None:
    status, output = command("verify", *only)
    assert status == 0
    assert f"proven  {CASE.id}" in output


def test_verify_convicts_other_bytes(only: list[str], folder: Path) -> None:
    stages = json.loads((folder / "manifest.json").read_text())["cases"][CASE.id]["stages"]
    rewrite(folder, stages={**stages, "slots": "0" * 64})
    status, output = command("verify", *only)
    assert status == 1
    assert "same recipe, other bytes" in output
    assert "stage slots" in output


def test_verify_of_nothing_is_not_green(folder: Path) -> None:
    status, output = command("verify", "--only", "no such case", "--folder", str(folder))
    assert status == 5
    assert "nothing was compared" in output


def test_unknown_options_are_usage_errors() -> None:
    assert command("verify", "--no-such-option")[0] == 2


def test_regenerate_keeps_what_is_the_same(only: list[str], folder: Path) -> None:
    before = (folder / "manifest.json").read_text()
    status, output = command("regenerate", *only)
    assert status == 0
    assert f"same    {CASE.id}" in output
    assert (folder / "manifest.json").read_text() == before


def test_regenerate_refuses_other_bytes_without_a_reason(only: list[str], folder: Path) -> None:
    stages = json.loads((folder / "manifest.json").read_text())["cases"][CASE.id]["stages"]
    rewrite(folder, stages={**stages, "y": "0" * 64})
    before = (folder / "manifest.json").read_text()
    status, output = command("regenerate", *only)
    assert status == 1
    assert "refused" in output
    assert "--reason" in output
    assert "y:" in output
    assert (folder / "manifest.json").read_text() == before
    status, _ = command("regenerate", "--reason", "the test wants it", *only)
    assert status == 0
    assert store.read(CASE, folder).entry["reason"] == "the test wants it"


def test_diff_prints_bits_and_writes_nothing(
    only: list[str], folder: Path, computed: tuple[str, dict[str, torch.Tensor]]
) -> None:
    status, output = command("diff", *only)
    assert status == 0
    assert "0 of 1 cases would change" in output
    sha256, trace = computed
    old = store.make_entry(CASE, sha256, changed(trace, "l2_acts"), "test", "a reason")
    store.write({CASE.id: old}, folder=folder)
    before = (folder / "manifest.json").read_text()
    status, output = command("diff", *only)
    assert status == 1
    assert "l2_acts: 1 of 11 rows" in output
    code = int(trace["l2_acts"][3, 0])
    assert f"[3, 0]: {code ^ 1:#04x} -> {code:#04x}" in output
    assert (folder / "manifest.json").read_text() == before


def test_diff_names_the_field_of_a_changed_recipe(only: list[str], folder: Path) -> None:
    other = CASE.recipe.replace(clamp=7.0)
    rewrite(folder, recipe=other.fields(), recipe_id=other.recipe_id)
    status, output = command("diff", *only)
    assert status == 1
    assert "clamp 7.0 -> 10.0" in output


def test_regenerate_accepts_a_new_recipe_without_a_reason(only: list[str], folder: Path) -> None:
    other = CASE.recipe.replace(clamp=7.0)
    rewrite(folder, recipe=other.fields(), recipe_id=other.recipe_id, stages=dict.fromkeys(STAGES, "0" * 64))
    status, output = command("regenerate", *only)
    assert status == 0
    assert "recipe" in output
    assert store.read(CASE, folder).entry["recipe_id"] == CASE.recipe.recipe_id


def test_capture_without_a_gpu_is_an_environment_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, output = command("capture", "--quick")
    assert status == 3
    assert "GPU" in output


def test_a_case_is_its_seed(computed: tuple[str, dict[str, torch.Tensor]]) -> None:
    other = dataclasses.replace(CASE, seed=CASE.seed + 1)
    assert run_case(other).sha256 != computed[0]
