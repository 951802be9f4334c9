"""What the recipe computes for each case, pinned: golden/manifest.json and small data files, never pickle.

A case's entry holds its recipe (id and fields), seed, digests of the inputs and of every stage, who made it and why.
The data file holds the stages themselves where they are small, else a digest a row, so that a difference can be placed
by source rank, token and slot. Inputs are stored as seed and digest alone.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from megaproof.cases import case_io
from megaproof.cases.cases import Case
from megaproof.golden import folders, untrusted
from megaproof.golden.errors import GoldenError
from megaproof.quant.host_state import guarded
from megaproof.quant.recipe import Recipe, RecipeError
from megaproof.reference.stages import STAGES
from megaproof.toolchain.errors import escaped

FOLDER = Path(__file__).resolve().parent
WHOLE_TRACE_BYTES = 200_000
"""A trace up to this size is stored whole; of a larger one, a digest a row."""


class RecipeChanged(GoldenError):
    """The recipe of a case is another than the golden's: the goldens are stale, and that is expected."""


class OtherBytes(GoldenError):
    """Same recipe, same inputs, other bytes: something is wrong, and the message says where."""


@dataclass(frozen=True)
class Golden:
    """One case's entry and data, read and verified."""

    entry: dict[str, Any]
    data: dict[str, Tensor]


# --- digests ----------------------------------------------------------------------------------------------------------


@guarded
def raw(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, uint8 [rows, bytes of a row] (one row for a vector), little-endian."""
    flat = tensor.cpu().contiguous()
    rows = flat.shape[0] if flat.dim() > 1 else 1
    return flat.reshape(rows, -1).view(torch.uint8).numpy() if flat.numel() else np.empty((rows, 0), np.uint8)


@guarded
def stage_digest(tensor: Tensor) -> str:
    """sha256 over the bytes of a stage."""
    return hashlib.sha256(raw(tensor).tobytes()).hexdigest()


@guarded
def row_digests(tensor: Tensor) -> Tensor:
    """int64 [rows]: the first eight bytes of the sha256 of each row."""
    digests = [int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8], "little", signed=True) for row in raw(tensor)]
    return torch.tensor(digests, dtype=torch.int64)


# --- making and reading -----------------------------------------------------------------------------------------------


@guarded
def make_entry(case: Case, inputs_sha256: str, trace: Mapping[str, Tensor], producer: str, reason: str) -> Golden:
    """The golden of a case from a trace of the layer."""
    stages = {name: trace[name] for name in STAGES}
    whole = sum(tensor.numel() * tensor.element_size() for tensor in stages.values()) <= WHOLE_TRACE_BYTES
    fields = case_io.to_json(case)
    entry = {
        "recipe_id": case.recipe.recipe_id,
        "recipe": fields["recipe"],
        "seed": fields["seed"],
        "inputs_sha256": inputs_sha256,
        "stages": {name: stage_digest(tensor) for name, tensor in stages.items()},
        "data": "stages" if whole else "row digests",
        "producer": producer,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "reason": reason,
    }
    data = {name: tensor.cpu().contiguous() if whole else row_digests(tensor) for name, tensor in stages.items()}
    return Golden(entry, data)


def read_manifest(folder: Path = FOLDER) -> dict[str, Any]:
    """Case id -> entry. Raises GoldenError when the manifest is missing or cannot be read."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise GoldenError("golden/manifest.json is missing: restore it, or run `python -m golden regenerate`")
    try:
        content = untrusted.parsed(untrusted.read(path, untrusted.MANIFEST_BYTES))
        cases = untrusted.checked("the manifest", content, {"cases": lambda value: isinstance(value, dict)})["cases"]
        for case_id, entry in cases.items():
            _check_entry(case_id, entry)
    except ValueError as error:
        raise GoldenError(f"golden/manifest.json is damaged ({error}): restore it") from error
    return cases


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_ENTRY = {
    "recipe_id": untrusted.is_sha256,
    "recipe": lambda value: isinstance(value, dict),
    "seed": lambda value: untrusted.is_count(value, 1 << 64),
    "inputs_sha256": untrusted.is_sha256,
    "stages": lambda value: isinstance(value, dict) and all(map(untrusted.is_sha256, value.values())),
    "data": lambda value: value in ("stages", "row digests"),
    "producer": _is_text,
    "versions": lambda value: isinstance(value, dict),
    "reason": _is_text,
    "file": folders.is_data_file,
    "file_sha256": untrusted.is_sha256,
}
"""Key of an entry -> whether its value may stand there."""


def _check_entry(case_id: str, entry: Any) -> None:
    """Raises ValueError unless an entry of the manifest is whole, so that nothing behind it has to ask."""
    untrusted.checked(f"the entry of {escaped(case_id)}", entry, _ENTRY)
    if entry["file"] != _file_name(entry["file_sha256"]):
        raise ValueError(f"{entry['file']} is named for {escaped(case_id)}, and its sha256 belongs to another name")


def _file_name(sha256: str) -> str:
    return f"{sha256[:16]}.safetensors"


def read(case: Case, folder: Path = FOLDER) -> Golden:
    """The golden of a case, its file's sha256 checked.

    Raises GoldenError when it is missing or damaged, RecipeChanged when it belongs to another recipe.
    """
    entries = read_manifest(folder)
    while True:
        try:
            return _read(case, entries, folder)
        except GoldenError:
            # A writer may have put another set in place meanwhile: then what was read is no set any more.
            now = read_manifest(folder)
            if now.get(case.id) == entries.get(case.id):
                raise
            entries = now


def _read(case: Case, entries: Mapping[str, Any], folder: Path) -> Golden:
    if case.id not in entries:
        raise GoldenError(f"no golden for {case.id}: run `python -m golden regenerate --reason ...` and commit it")
    entry = entries[case.id]
    if entry["recipe_id"] != case.recipe.recipe_id:
        raise RecipeChanged(
            f"recipe changed, goldens stale: {case.id} was made with recipe {entry['recipe_id'][:12]}, now it is "
            f"{case.recipe.recipe_id[:12]} ({_recipe_diff(entry['recipe'], case.recipe)}); "
            "if the change is meant, run `python -m golden regenerate`"
        )
    golden = read_entry(entry, folder)
    for name, tensor in golden.data.items():
        _check_shape(case, name, tensor, entry)
    return golden


def _check_shape(case: Case, name: str, tensor: Tensor, entry: Mapping[str, Any]) -> None:
    """Raises GoldenError where a tensor can't be the case's: another dtype, other columns, more rows than there are."""
    stage, whole = STAGES[name], entry["data"] == "stages"
    tokens = sum(case.tokens)
    rows = {"slot": tokens * case.shape.topk, "token": tokens, "expert": case.shape.experts}[stage.rows]
    if stage.columns is None and not whole:
        rows = 1
    columns = [stage.width(case.shape, case.recipe)] if whole and stage.columns else []
    dtype = stage.format(case.recipe).dtype if whole else torch.int64
    fits = tensor.shape[0] <= rows if stage.rows == "slot" else tensor.shape[0] == rows
    if tensor.dtype != dtype or not fits or (tensor.shape[0] and list(tensor.shape[1:]) != columns):
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise GoldenError(f"golden/data/{entry['file']} is damaged: {name} of {case.id} can't be {found}; restore it")


def read_entry(entry: dict[str, Any], folder: Path = FOLDER) -> Golden:
    """The golden of an entry of the manifest. Raises GoldenError when its file is missing or damaged."""
    name = f"golden/data/{entry['file']}"
    path = folder / "data" / entry["file"]
    if not path.is_file():
        raise GoldenError(f"{name} is missing: restore it")
    blob = untrusted.read(path, untrusted.DATA_BYTES)
    if hashlib.sha256(blob).hexdigest() != entry["file_sha256"]:
        raise GoldenError(f"{name} is damaged: its sha256 is not the manifest's")
    data = untrusted.tensors(name, blob)
    if not data.keys() == entry["stages"].keys() == STAGES.keys():
        raise GoldenError(
            f"{name} is damaged: it and the manifest must have the stages {', '.join(STAGES)}; restore it"
        )
    return Golden(entry, data)


def check_folder(folder: Path = FOLDER) -> None:
    """Raises GoldenError where a set can't be written, since a file is there that is not of the goldens: it is named.

    `write` asks this too; a command asks it before its work.
    """
    if folder.resolve() != FOLDER:
        folders.refuse_other_folder(folder, ("manifest.json", "data"))
    named = {entry["file"] for entry in read_manifest_or_none(folder).values()}
    folders.refuse_foreign(folder / "data", named, folder)


def write(goldens: Mapping[str, Golden], keep: Iterable[str] = (), folder: Path = FOLDER) -> None:
    """Replaces the whole set under the folder's lock: data files first, the manifest by one rename, old files last.

    `keep` lists ids whose present entries stay. Interrupted or killed at any point, the old set or the new one is
    whole. Raises GoldenError where the folder holds a foreign file, another process writes it, or it can't be written.
    """
    with folders.one_writer(folder):
        check_folder(folder)
        (folder / "data").mkdir(exist_ok=True)
        old, kept, data = read_manifest_or_none(folder), set(keep), {}
        cases = {case_id: entry for case_id, entry in old.items() if case_id in kept}
        for case_id, golden in goldens.items():
            blob = save_tensors(golden.data)
            sha256 = hashlib.sha256(blob).hexdigest()
            file = _file_name(sha256)
            data[folder / "data" / file] = blob
            cases[case_id] = {**golden.entry, "file": file, "file_sha256": sha256}
        text = json.dumps({"cases": dict(sorted(cases.items()))}, indent=1, sort_keys=True) + "\n"
        before = {folder / "data" / entry["file"] for entry in old.values()}
        named = {entry["file"] for entry in cases.values()}
        folders.write(folder, data, {folder / "manifest.json": text.encode()}, before, named)


def read_manifest_or_none(folder: Path = FOLDER) -> dict[str, Any]:
    """The manifest, or an empty one where there is none yet. A damaged one is an error all the same."""
    return read_manifest(folder) if (folder / "manifest.json").exists() else {}


# --- comparing --------------------------------------------------------------------------------------------------------


@guarded
def check(case: Case, golden: Golden, inputs_sha256: str, trace: Mapping[str, Tensor]) -> int:
    """Compares a trace with the golden, stage by stage; returns the number of bytes compared.

    Raises OtherBytes at the first stage that differs, naming its first rows as (rank, token, slot).
    """
    if inputs_sha256 != golden.entry["inputs_sha256"]:
        raise OtherBytes(f"{case.id}: the inputs have other bytes than the golden's, so the generator changed")
    compared = 0
    for name in STAGES:
        if stage_digest(trace[name]) != golden.entry["stages"][name]:
            raise OtherBytes(f"same recipe, other bytes: {case.id} stage {name}: {_where(name, golden, trace)}")
        compared += trace[name].numel() * trace[name].element_size()
    return compared


def changed_stages(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names of the stages whose digests differ between two entries."""
    return [name for name in STAGES if old["stages"].get(name) != new["stages"][name]]


def changed_rows(name: str, golden: Golden, trace: Mapping[str, Tensor]) -> list[int]:
    """Rows of a stage that differ from the golden's. Empty where the number of rows itself differs."""
    whole = golden.entry["data"] == "stages"
    expected = row_digests(golden.data[name]) if whole else golden.data[name]
    actual = row_digests(trace[name])
    return (expected != actual).nonzero().flatten().tolist() if expected.shape == actual.shape else []


def _where(name: str, golden: Golden, trace: Mapping[str, Tensor]) -> str:
    wrong = changed_rows(name, golden, trace)
    total = trace[name].shape[0]
    if not wrong:
        return f"another number of rows than the golden's (now {total})"
    of_slots = STAGES[name].rows == "slot"
    if STAGES[name].columns is None:  # one digest for the whole vector
        return "the statistics differ"
    places = ["(rank, token, slot) " + _triple(trace, row) if of_slots else f"token row {row}" for row in wrong[:3]]
    return f"{len(wrong)} of {total} rows differ, first {', '.join(places)}"


def _triple(trace: Mapping[str, Tensor], row: int) -> str:
    return str(tuple(trace["rows"][row].tolist()))


def _recipe_diff(fields: dict[str, Any], recipe: Recipe) -> str:
    try:
        changes = Recipe.from_fields(fields).diff(recipe)
    except RecipeError as error:
        return f"the golden's recipe is not ours: {error}"
    return ", ".join(f"{name}: {old} -> {new}" for name, (old, new) in changes.items()) or "a field was added"
