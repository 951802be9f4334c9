"""`python -m proof emulate`: random small layers under the emulator, each proven in three launches.

Shapes, routing, rings, granularity, blocks and interleavings follow from the seed; three quarters of the interleavings
have slow warps or blocks. Exit status 1 at the first layer that is wrong, with what repeats it.
"""

from __future__ import annotations

import random
import sys
from typing import Annotated

import torch
import typer

from megaproof.cases.cases import Case
from megaproof.cases.run import run_case
from megaproof.kernel import emulator
from megaproof.kernel.host.buffer import BufferSize
from megaproof.kernel.host.sizes import WAVE_BLOCKS
from megaproof.proof.adapters import Prepared
from megaproof.proof.adapters.emulated import EmulatedAdapter
from megaproof.proof.prove import Proof, prove
from megaproof.quant.recipe import Recipe
from megaproof.quant.shapes import Shape
from megaproof.toolchain.errors import EnvironmentMissing


def draw(seed: int) -> tuple[Case, int | None, emulator.Run]:
    """(case, ring, run) of a seed."""
    rng = random.Random(seed)
    ranks, local = rng.choice([1, 1, 2, 4]), rng.choice([1, 2, 3, 8, 20, 60])
    experts = ranks * local
    topk = min(rng.choice([1, 2, 4, 6]), experts)
    hidden, intermediate = (128 * rng.choice([1, 1, 2, 3]) for _ in range(2))
    tokens = tuple(rng.choice([0, 1, 3, 17, 40, 70, 140]) for _ in range(ranks))
    granularity, silu, clamp = rng.choice([64, 64, 128]), rng.choice(["fast", "precise"]), rng.choice([None, 0.5, 10.0])
    shape = Shape(f"h{hidden}i{intermediate}", hidden=hidden, intermediate=intermediate, experts=experts, topk=topk)
    case = Case(shape, tokens, recipe=Recipe(activation_granularity=granularity, silu=silu, clamp=clamp))
    every = BufferSize(ranks, experts, topk, hidden, intermediate, max(1, *tokens)).pool_blocks
    ring = rng.choice([None, 2 * WAVE_BLOCKS, 2 * WAVE_BLOCKS + 1])
    if ring is not None:
        ring = max(ring, min(2 * WAVE_BLOCKS, every))
    interleaving = rng.choice([0, 1, 3, 3]) + 4 * rng.randrange(1 << 20)
    return case, ring, emulator.Run(blocks=rng.choice([1, 2, 3, 5]), seed=interleaving)


def proof(seed: int) -> Proof:
    """Raises AssertionError."""
    case, ring, run = draw(seed)
    found = run_case(case, "cpu")
    return prove(EmulatedAdapter(ring, run), Prepared(case, found.inputs, torch.device("cpu")), found.result)


def emulate_command(
    count: Annotated[int, typer.Option(min=1, help="Layers.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the first layer.")] = 0,
) -> None:
    """The kernel's sources on a CPU: proves small layers, each drawn from a seed.

    Exit status: 0 proven, 1 differs, 3 environment.
    """
    elements = 0
    for own in range(seed, seed + count):
        try:
            elements += proof(own).elements
        except AssertionError as error:
            print(f"seed {own}, {draw(own)}: {error}\nreproduce with: python -m proof emulate --count 1 --seed {own}")
            raise typer.Exit(1) from error
        except EnvironmentMissing as error:
            print(f"environment: {error}", file=sys.stderr)
            raise typer.Exit(3) from error
    print(f"{count} layers of 3 launches, {elements:,} elements compared, 0 mismatches")
