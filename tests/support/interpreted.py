"""The baseline's SwiGLU kernel under Triton's interpreter, in a process of its own.

Triton decides when it is imported whether it interprets, so the variable must be set before. `python -m
megaproof.tests.support.interpreted IN OUT`: IN a safetensors file with gate_up and weight, whose metadata recipes is a
JSON list of recipe fields; OUT gets codes<i> and scales<i> of each, in the form without inline PTX.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

from safetensors import safe_open
from safetensors.torch import save_file

from megaproof.kernel.baseline.swiglu import swiglu_quantise
from megaproof.quant.recipe import Recipe
from megaproof.toolchain.errors import EnvironmentMissing


def main(source: str, target: str) -> None:
    """See the module."""
    with safe_open(source, "pt") as file:
        gate_up, weight = file.get_tensor("gate_up"), file.get_tensor("weight")
        recipes = [Recipe.from_fields(fields) for fields in json.loads(file.metadata()["recipes"])]
    try:
        swiglu_quantise(recipes[0], gate_up, weight)
    except EnvironmentMissing as error:
        print(error)
    else:
        raise AssertionError("the exact form ran under the interpreter, which has no inline PTX")
    out = {}
    for i, recipe in enumerate(recipes):
        out[f"codes{i}"], out[f"scales{i}"] = swiglu_quantise(recipe, gate_up, weight, portable=True)
    save_file(out, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
