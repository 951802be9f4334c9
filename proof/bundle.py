"""What a failure leaves behind: a small pair of files from which `python -m reference explain` starts.

`<case id>-<stage>.safetensors` holds the differing row of the stage and the token's row of y, expected and actual;
the `.json` beside it holds the case, the place, the bits and versions, and the sha256 of the first. The JSON is written
last, so an interrupted write is an incomplete bundle and never a wrong one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from megaproof.cases import case_io
from megaproof.cases.cases import Case
from megaproof.proof import report
from megaproof.proof.divergence import Divergence
from megaproof.proof.divergence.place import Place
from megaproof.quant import twin
from megaproof.quant.recipe import RecipeError
from megaproof.quant.stored import unsigned
from megaproof.reference.stages import STAGES
from megaproof.toolchain.errors import escaped
from megaproof.toolchain.files import replace

LARGEST = 1 << 20
"""Bytes of a bundle."""
FORMAT = 1
"""Version of the layout; a reader refuses another."""


class BundleError(ValueError):
    """A bundle that is missing, damaged or of another version; the message names the file and the reason."""


@dataclass(frozen=True)
class Bundle:
    """A bundle, read and verified."""

    case: Case
    stage: str
    place: dict[str, Any]
    """Fields of `divergence.place.Place`."""
    expected_bits: int
    actual_bits: int
    patterns: list[str]
    rows: dict[str, Tensor]
    """'expected', 'actual': the row of the stage; 'y_expected', 'y_actual': the token's row of y, where it has one."""
    versions: dict[str, str]


def write(divergence: Divergence, case: Case, folder: Path | None = None) -> Path:
    """Writes the bundle of a divergence and returns the path of its JSON; an older one of the same name is replaced.

    folder: default: `bundles` in the folder of reports, see `report.folder`.

    Raises BundleError for a divergence without an element (a wrong shape), and above LARGEST bytes.
    """
    if divergence.place is None:
        raise BundleError(f"stage {divergence.stage}: {divergence.problem}: there is no element to keep")
    if divergence.case_id != case.id:
        raise BundleError(f"the divergence is of case {divergence.case_id}, not of {case.id}")
    blob = save_tensors({name: row.contiguous() for name, row in divergence.rows.items()})
    entry = {
        "bundle": FORMAT,
        "case_id": case.id,
        "case": case_io.to_json(case),
        "seed": case.seed,
        "recipe_id": case.recipe.recipe_id,
        "stage": divergence.stage,
        "equation": divergence.equation,
        "place": dataclasses.asdict(divergence.place),
        "expected_bits": f"0x{divergence.expected_bits:x}",
        "actual_bits": f"0x{divergence.actual_bits:x}",
        "format": divergence.format,
        "extent": divergence.extent,
        "patterns": [f"{pattern.name}: {pattern.text}" for pattern in divergence.patterns],
        "tensors_sha256": hashlib.sha256(blob).hexdigest(),
        "versions": versions(),
    }
    text = (json.dumps(entry, indent=1) + "\n").encode()
    if len(blob) + len(text) > LARGEST:
        raise BundleError(f"the bundle of {case.id} would be {len(blob) + len(text):,} bytes; at most {LARGEST:,}")
    folder = folder or report.folder() / "bundles"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{case.id}-{divergence.stage}.json"
    path.unlink(missing_ok=True)
    replace(path.with_suffix(".safetensors"), blob)
    replace(path, text)
    return path


def note(divergence: Divergence, case: Case) -> str:
    """Writes the bundle and says where it is; one that can't be written says why, which is no failure of its own."""
    try:
        return f"bundle: {write(divergence, case)}"
    except (BundleError, OSError) as error:
        return f"bundle: not written ({error})"


def read(path: Path) -> Bundle:
    """The bundle of a JSON file (or of the safetensors file beside it), its tensors verified.

    Raises BundleError naming the file and what is wrong with it.
    """
    path = path.with_suffix(".json")
    tensors = path.with_suffix(".safetensors")
    for file in (path, tensors):
        if not file.is_file():
            raise BundleError(f"bundle {path.stem}: {file.name} is missing, so it was not written to its end")
    try:
        for file in (path, tensors):
            if file.stat().st_size > LARGEST:
                raise BundleError(f"{file.name} is larger than a bundle can be: at most {LARGEST:,} bytes")
        entry = json.loads(path.read_bytes())
        if entry["bundle"] != FORMAT:
            raise BundleError(f"{path.name} has bundle format {escaped(entry['bundle'])}; this version reads {FORMAT}")
        blob = tensors.read_bytes()
        if hashlib.sha256(blob).hexdigest() != entry["tensors_sha256"]:
            raise BundleError(f"{tensors.name} is damaged: its sha256 is not the one that {path.name} names")
        found = Bundle(
            case_io.from_json(entry["case"]),
            entry["stage"],
            entry["place"],
            int(entry["expected_bits"], 16),
            int(entry["actual_bits"], 16),
            [escaped(pattern, LARGEST) for pattern in entry["patterns"]],
            load_tensors(blob),
            {escaped(name): escaped(value) for name, value in entry["versions"].items()},
        )
        _check(found)
    except BundleError:
        raise
    except RecipeError as error:
        known = "is of a recipe or shape that this version does not know"
        raise BundleError(f"{path.name} {known}: {escaped(error)}") from error
    except OSError as error:
        raise BundleError(f"{path.name} can't be read: {error.strerror}") from error
    except Exception as error:  # a file that anybody may have written: JSON, safetensors and values can fail anyhow
        raise BundleError(f"{path.name} is damaged: {type(error).__name__}: {escaped(error)}") from error
    return found


def _check(found: Bundle) -> None:
    """The coordinates and the bits are those of the rows."""
    if not isinstance(found.stage, str) or found.stage not in STAGES:
        raise BundleError(f"stage {escaped(found.stage)} is none of {', '.join(STAGES)}")
    stage = STAGES[found.stage]
    _check_place(found.place, found.case)
    column = 0 if stage.columns is None else found.place["column"]  # each entry of a vector is a row
    for side, bits in (("expected", found.expected_bits), ("actual", found.actual_bits)):
        row = found.rows[side]
        if row.dtype != stage.format(found.case.recipe).dtype or int(unsigned(row)[column]) != bits:
            raise BundleError(f"the {side} row does not hold {bits:#x} in column {column}, as the JSON says")


def _check_place(place: dict[str, Any], case: Case) -> None:
    """Whole numbers that are places of the case."""
    rank = place["rank"]
    if type(rank) is not int or not 0 <= rank < case.ranks:
        raise BundleError("damaged: the place's rank is none of the case's")
    ends = {"token": case.tokens[rank], "slot": case.shape.topk, "expert": case.shape.experts}
    ends |= {"destination": case.ranks, "column": 2 * max(case.shape.hidden, case.shape.intermediate)}
    for field in dataclasses.fields(Place):
        value = place[field.name]
        if field.name != "tile" and value is not None:
            if type(value) is not int or not 0 <= value < ends.get(field.name, 1 << 40):
                raise BundleError(f"damaged: the place's {field.name} is none of the case's")


def versions() -> dict[str, str]:
    """What computed the expected values."""
    return {"python": platform.python_version(), "torch": torch.__version__, "arithmetic": twin.describe("cpu")}
