"""Factories of `--kernel` that return what is no adapter."""

from __future__ import annotations

from megaproof.proof.adapters.reference import ReferenceAdapter


class Half:
    name = "half an adapter"
    y = None

    def claims(self, recipe: object) -> None:
        return None


class Nameless(ReferenceAdapter):
    name = None  # type: ignore[assignment]


def half() -> Half:
    return Half()


def nameless() -> Nameless:
    return Nameless()
