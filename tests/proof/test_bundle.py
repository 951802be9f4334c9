"""Bundles: what a failure leaves can be read back, is small, and says so when it is damaged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megaproof.cases.cases import Case, find
from megaproof.cases.run import run_case
from megaproof.proof import bundle
from megaproof.proof.divergence import Divergence, first_divergence
from megaproof.quant.stored import unsigned
from megaproof.reference.stages import STAGES

CASE = find("smoke-r2-t5-clamp10-fast1-zipf-mask30")


def planted(stage: str = "l2_acts", case: Case = CASE) -> Divergence:
    """The last bit of the middle element of a stage is wrong."""
    run = run_case(case, "cpu")
    wrong = {name: run.trace[name].clone() for name in STAGES}
    flat = wrong[stage].reshape(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[wrong[stage].element_size()])
    flat[len(flat) // 2] ^= 1
    y, stats = wrong.pop("y").split(list(case.tokens)), wrong.pop("stats")
    by_rank = stats.split(case.shape.experts_per_rank(case.ranks))
    divergence = first_divergence(run.result, wrong, list(y), list(by_rank), case)
    assert divergence is not None
    return divergence


@pytest.mark.parametrize("stage", STAGES)
def test_a_bundle_reads_back_what_was_written(stage: str, tmp_path: Path) -> None:
    divergence = planted(stage)
    path = bundle.write(divergence, CASE, tmp_path)
    assert path.name == f"{CASE.id}-{stage}.json"
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < bundle.LARGEST
    for name in (path, path.with_suffix(".safetensors")):
        found = bundle.read(name)
        assert (found.case, found.stage) == (CASE, stage)
        assert (found.expected_bits, found.actual_bits) == (divergence.expected_bits, divergence.actual_bits)
        assert divergence.place is not None
        assert found.place == json.loads(json.dumps(dataclasses.asdict(divergence.place)))
        assert set(found.rows) == {"expected", "actual"} | ({"y_expected", "y_actual"} if stage != "stats" else set())
        for side, row in divergence.rows.items():
            assert torch.equal(unsigned(row), unsigned(found.rows[side]))
        assert found.versions["torch"] == torch.__version__
        assert found.patterns or stage == "stats"


def test_a_bundle_is_small_or_refused(tmp_path: Path) -> None:
    """The widest rows there are, 7168 columns on both sides, fit; what is above a megabyte is not written."""
    wide = {side: torch.zeros(7168, dtype=torch.bfloat16) for side in ("expected", "actual", "y_expected", "y_actual")}
    path = bundle.write(dataclasses.replace(planted("y"), rows=wide), CASE, tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < bundle.LARGEST // 8
    path.unlink()
    large = {"expected": torch.zeros(bundle.LARGEST, dtype=torch.uint8)}
    with pytest.raises(bundle.BundleError, match="at most 1,048,576"):
        bundle.write(dataclasses.replace(planted("y"), rows=large), CASE, tmp_path)
    assert not path.exists()


def test_a_second_failure_replaces_the_first(tmp_path: Path) -> None:
    bundle.write(planted(), CASE, tmp_path)
    again = dataclasses.replace(planted(), patterns=())
    path = bundle.write(again, CASE, tmp_path)
    assert bundle.read(path).patterns == []
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_an_interrupted_write_is_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was there before: the old JSON never stands beside new tensors."""
    path = bundle.write(planted(), CASE, tmp_path)

    def full(target: Path, data: bytes) -> None:
        if target.suffix == ".json":
            raise OSError("no space left on device")
        target.write_bytes(data)

    monkeypatch.setattr(bundle, "replace", full)
    with pytest.raises(OSError, match="no space"):
        bundle.write(planted(), CASE, tmp_path)
    with pytest.raises(bundle.BundleError, match="missing, so it was not written to its end"):
        bundle.read(path)


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        entry = json.loads(path.read_text())
        change(entry)
        path.write_text(json.dumps(entry))

    return apply


def damage_tensors(path: Path) -> None:
    file = path.with_suffix(".safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_tensors, "sha256 is not the one"),
        (lambda path: path.with_suffix(".safetensors").unlink(), "safetensors is missing"),
        (lambda path: path.write_text("{"), "damaged"),
        (lambda path: path.write_text("[]"), "damaged"),
        (edit(lambda e: e.pop("place")), "damaged"),
        (edit(lambda e: e.update(bundle=2)), "format 2"),
        (edit(lambda e: e.update(stage="l3_acts")), "l3_acts"),
        (edit(lambda e: e.update(expected_bits="0x7f")), "does not hold 0x7f"),
        (edit(lambda e: e["place"].update(column=100_000)), "damaged"),
        (edit(lambda e: e["case"]["recipe"].update(silu="slow")), "does not know"),
        (edit(lambda e: e["case"].update(colour="red")), "damaged"),
    ],
)
def test_damage_is_named(damage: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    path = bundle.write(planted(), CASE, tmp_path)
    damage(path)
    with pytest.raises(bundle.BundleError, match=says):
        bundle.read(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e["case"].update(tokens=[10**12, 1]),
        lambda e: e["case"].update(tokens=[1] * 10_000),
        lambda e: e["case"]["shape"].update(hidden=128 << 40),
        lambda e: e["case"]["shape"].update(experts=10**15),
        lambda e: e["case"].update(seed=1 << 64),
        lambda e: e["case"].update(family="\x1b[2Jmixed"),
        lambda e: e["place"].update(rank=-1),
        lambda e: e["place"].update(token=10**6),
        lambda e: e["place"].update(slot="\x1b[2J"),
        lambda e: e.update(stage=["\x1b[2J"]),
        lambda e: e.update(bundle="\x1b[2J"),
        lambda e: e.update(expected_bits="0x" + "f" * 5000),
    ],
)
def test_nothing_of_a_strangers_bundle_is_believed(change: Callable[[dict], object], tmp_path: Path) -> None:
    """Sizes are bounded before anything is allocated, and nothing steers a terminal."""
    path = bundle.write(planted(), CASE, tmp_path)
    edit(change)(path)
    with pytest.raises(bundle.BundleError) as caught:
        bundle.read(path)
    assert str(caught.value).isprintable()


def test_a_file_larger_than_a_bundle_is_not_read(tmp_path: Path) -> None:
    path = bundle.write(planted(), CASE, tmp_path)
    with path.with_suffix(".safetensors").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(bundle.BundleError, match="larger than a bundle"):
        bundle.read(path)


def test_every_damage_of_bytes_is_a_bundle_error(tmp_path: Path) -> None:
    """Flips and cuts of both files; the digest of the tensors is made to fit, so that their own format is read."""
    path = bundle.write(planted(), CASE, tmp_path)
    text, blob = path.read_bytes(), path.with_suffix(".safetensors").read_bytes()
    chance = random.Random(7)
    refused: list[str] = []
    for turn in range(400):
        parts = [bytearray(text), bytearray(blob)]
        hit = parts[turn % 2]
        if turn % 4 < 2:
            hit[chance.randrange(min(len(hit), 2000))] ^= 1 << chance.randrange(8)
        else:
            del hit[chance.randrange(len(hit)) :]
        if turn % 2:
            old, new = (hashlib.sha256(data).hexdigest().encode() for data in (blob, bytes(parts[1])))
            parts[0] = bytearray(text.replace(old, new))
        path.write_bytes(parts[0])
        path.with_suffix(".safetensors").write_bytes(parts[1])
        try:
            bundle.read(path)
        except bundle.BundleError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert all(map(str.isprintable, refused))


def test_a_bundle_that_cannot_be_written_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reports").write_text("a file where the folder would be")
    monkeypatch.setattr(bundle.report, "folder", lambda: tmp_path / "reports")
    assert bundle.note(planted(), CASE).startswith("bundle: not written (")


def test_what_has_no_element_is_refused(tmp_path: Path) -> None:
    shapeless = dataclasses.replace(planted(), place=None, problem="rank 0: expected ..., got ...")
    with pytest.raises(bundle.BundleError, match="no element to keep"):
        bundle.write(shapeless, CASE, tmp_path)
    with pytest.raises(bundle.BundleError, match="not of smoke-r1"):
        bundle.write(planted(), find("smoke-r1-t5-clamp10-fast1-zipf-mask30"), tmp_path)
    assert not any(tmp_path.iterdir())
