"""What a process of ours sees of itself, as JSON: `python -m megaproof.tests.support.whoami ARGUMENTS`."""

from __future__ import annotations

import importlib.util
import json
import os
import sys

import megaproof
from megaproof.quant import recipe

if __name__ == "__main__":
    beside = importlib.util.find_spec("an_adapter_beside_the_caller")
    found = {
        "megaproof": megaproof.__file__,
        "quant": recipe.__file__,
        "cwd": os.getcwd(),
        "arguments": sys.argv[1:],
        "beside": beside is not None,
        "changed": os.environ.get("CHANGED"),
    }
    print(json.dumps(found))
