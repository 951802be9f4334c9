"""Adapters that do what no kernel may: each kind with the exit status that a run of it has, and what the run says.

The reference with one thing changed, as in `faults/adapters.py`; here it is not the arithmetic that is wrong, but how
it is answered. Run as `--kernel megaproof.proof.faults.hostile:<name>`.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from typing import Any

import torch
from torch import Tensor

from megaproof.proof.adapters.reference import ReferenceAdapter
from megaproof.proof.divergence import find
from megaproof.quant.recipe import Recipe


def wrong(y: list[Tensor]) -> list[Tensor]:
    """One bit of y."""
    changed = [part.clone() for part in y]
    next(part for part in changed if part.numel()).view(torch.int16)[0, 0] ^= 1
    return changed


class Wrong(ReferenceAdapter):
    """One bit of y, shown openly."""

    def y(self) -> list[Tensor]:
        return wrong(super().y())


class Exits(ReferenceAdapter):
    def launch(self) -> None:
        os._exit(0)


class ExitsAtClose(Wrong):
    def close(self) -> None:
        if self.prepared is not None:
            os._exit(0)


class ExitsAtExit(Wrong):
    def launch(self) -> None:
        atexit.register(os._exit, 0)
        super().launch()


class SystemExits(ReferenceAdapter):
    def launch(self) -> None:
        sys.exit(0)


class PytestExits(ReferenceAdapter):
    def launch(self) -> None:
        outcome("exit")("done", 0)


class Skips(ReferenceAdapter):
    def launch(self) -> None:
        outcome("skip")("no triton here")


class SkipsIfWrong(Wrong):
    def y(self) -> list[Tensor]:
        raise importlib.import_module("unittest.case").SkipTest("flaky")


class ExpectsFailure(Wrong):
    def y(self) -> list[Tensor]:
        return outcome("xfail")("known")


class CloseRaises(ReferenceAdapter):
    def close(self) -> None:
        if self.prepared is not None:
            raise RuntimeError("close")


class StagesNone(ReferenceAdapter):
    def stages(self) -> Any:
        return None


class StagesMissing(ReferenceAdapter):
    stages = None


class StagesRenamed(ReferenceAdapter):
    def stages(self) -> dict[str, Tensor]:
        return {f"{name}_": stage for name, stage in super().stages().items()}


class NoStages(ReferenceAdapter):
    def stages(self) -> dict[str, Tensor]:
        return {}


class WrongShape(ReferenceAdapter):
    def y(self) -> list[Tensor]:
        return [torch.cat([part, part[:1]]) for part in super().y()]


class FewRanks(ReferenceAdapter):
    def y(self) -> list[Tensor]:
        return super().y()[:-1]


class WrongDtype(ReferenceAdapter):
    def y(self) -> list[Tensor]:
        return [part.view(torch.int16) for part in super().y()]


class WrongDevice(ReferenceAdapter):
    def y(self) -> list[Tensor]:
        return [part.to("meta") for part in super().y()]


class Nothing(ReferenceAdapter):
    def y(self) -> Any:
        return None


class Generator(ReferenceAdapter):
    def y(self) -> Any:
        return (part for part in super().y())


class Strided(ReferenceAdapter):
    """Right values in another order of memory: as good as any."""

    def y(self) -> list[Tensor]:
        return [part.mT.contiguous().mT for part in super().y()]


class Lazy(ReferenceAdapter):
    """Reads as the right values; the memory holds -y."""

    def y(self) -> list[Tensor]:
        return [torch._neg_view(-part) for part in super().y()]


class Liar(torch.Tensor):
    """Whose != says that nothing differs."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        return torch.zeros_like(found) if func in (torch.Tensor.ne, torch.Tensor.__ne__) else found


class Lies(Wrong):
    def y(self) -> list[Tensor]:
        return [part.as_subclass(Liar) for part in super().y()]


class Patches(Wrong):
    """Replaces what compares; the process has to be its own."""

    def launch(self) -> None:
        find._differs = lambda ours, theirs: torch.zeros(max(1, len(ours)), 1, dtype=torch.bool)
        torch.equal = lambda ours, theirs: True
        super().launch()


class WritesAndPutsBack(ReferenceAdapter):
    def launch(self) -> None:
        for _ in range(2):
            for part in self.prepared.inputs.x:
                part ^= 1
        super().launch()


class ChangesLater(ReferenceAdapter):
    """y is a view of a buffer that the next question changes."""

    held: list[Tensor] | None = None

    def y(self) -> list[Tensor]:
        self.held = [part.clone() for part in super().y()]
        return self.held

    def stats(self) -> list[Tensor]:
        for part in self.held or []:
            part.zero_()
        return super().stats()


class DoesNotFill(ReferenceAdapter):
    """Says that it can fill its buffers, and does not."""

    def fill(self, byte: int) -> None:
        return None


class StaleAtEqualSizes(ReferenceAdapter):
    """Gives its first answer again where sizes and weights are those of an earlier launch."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[tuple[Any, ...], dict[str, Any]] = {}

    def launch(self) -> None:
        super().launch()
        key = (tuple(part.shape for part in super().y()), id(self.prepared.inputs.weights))
        answer = {"y": super().y(), "stages": super().stages()}
        self.answer = self.first.setdefault(key, answer)

    def y(self) -> list[Tensor]:
        return self.answer["y"]

    def stages(self) -> dict[str, Tensor]:
        return self.answer["stages"]


class ClaimsNothing(ReferenceAdapter):
    def claims(self, recipe: Recipe) -> str | None:
        return "I compute nothing"


class ClaimsEmpty(ReferenceAdapter):
    def claims(self, recipe: Recipe) -> str | None:
        return ""


class ClaimsTrue(ReferenceAdapter):
    def claims(self, recipe: Recipe) -> Any:
        return True


class NameWithEscapes(ReferenceAdapter):
    name = "x\x1b[2J\x1b]0;owned\x07"


class NameEmpty(ReferenceAdapter):
    name = ""


class WorldsInWords(ReferenceAdapter):
    worlds = "virtual"


def factory_skips() -> None:
    """A factory that skips."""
    outcome("skip")("no triton here")


def factory_returns_nothing() -> None:
    """A factory that returns None."""


def outcome(name: str) -> Any:
    """pytest's function, imported here: the product runs without it."""
    import pytest

    return getattr(pytest, name)


HOSTILE: dict[str, tuple[int, str]] = {
    "Wrong": (1, "y: "),
    "Exits": (1, "the session's process ended before its session (exit status 0)"),
    "ExitsAtClose": (1, "the session's process ended before its session (exit status 0)"),
    "ExitsAtExit": (1, "y: "),
    "SystemExits": (1, "launch() of the adapter raised SystemExit"),
    "PytestExits": (1, "launch() of the adapter raised Exit"),
    "Skips": (1, "launch() of the adapter raised Skipped"),
    "SkipsIfWrong": (1, "y() of the adapter raised SkipTest"),
    "ExpectsFailure": (1, "y() of the adapter raised XFailed"),
    "CloseRaises": (1, "RuntimeError: close"),
    "StagesNone": (1, "stages: stages() is a NoneType"),
    "StagesMissing": (4, "without stages"),
    "StagesRenamed": (1, "stages: l1_acts_,"),
    "NoStages": (0, "not shown"),
    "WrongShape": (1, "y: "),
    "FewRanks": (1, "y must be a list of 2 tensors"),
    "WrongDtype": (1, "got torch.int16"),
    "WrongDevice": (1, "on meta"),
    "Nothing": (1, "y: y is a NoneType"),
    "Generator": (1, "y: y is a generator"),
    "Strided": (0, ""),
    "Lazy": (1, "lazily"),
    "Lies": (1, "is a Liar"),
    "Patches": (1, "bytes: y differs"),
    "WritesAndPutsBack": (1, "inputs: the adapter wrote to its inputs, and put them back"),
    "ChangesLater": (1, "changed: y() 0 was changed"),
    "DoesNotFill": (1, "fill of the second launch"),
    "StaleAtEqualSizes": (1, "of other inputs of the same sizes"),
    "ClaimsNothing": (5, "not claimed by reference as ranks: I compute nothing"),
    "ClaimsEmpty": (1, "claims() of the adapter returned ''"),
    "ClaimsTrue": (1, "claims() of the adapter returned True"),
    "NameWithEscapes": (4, "name (a str), of printable characters"),
    "NameEmpty": (4, "name (a str), of printable characters"),
    "WorldsInWords": (4, "worlds (a tuple"),
    "factory_skips": (4, "factory_skips() of the adapter raised Skipped"),
    "factory_returns_nothing": (4, "returned a NoneType"),
}
"""Name -> (exit status of `pytest --kernel` on one case, what it says)."""
