"""What each rank of a run does, in a process of its own that `gloo.py` has its template fork.

The template imports torch and loads the compiled arithmetic once (`load`); a rank begins there (`be_rank`). In the
run's folder every rank leaves, as rank<r>.<name>: log (what it prints), mark (how far it is, see `supervisor.Mark`),
stack (where each of its threads is, when asked by SIGUSR1), result.safetensors, and error.json when it raised. A rank
computes on one thread, and ends with the process that started the run.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megaproof.cases import case_io, inputs
from megaproof.cases.cases import Case
from megaproof.cases.run import dimensions
from megaproof.proof.worlds.supervisor import Mark
from megaproof.quant.shapes import Shape
from megaproof.reference.exchange import Exchange, check_messages
from megaproof.reference.layer import moe_layer
from megaproof.reference.ranks import RankResult, rank_layer
from megaproof.toolchain import template

Before = Callable[[Exchange, int], Exchange]
"""Called in each rank before its layer, as before(exchange, rank); returns the exchange to use."""


class PeerLost(RuntimeError):
    """The exchange broke: another rank is gone. The cause is there, not here."""


class Progress:
    """The marks that a rank leaves in a file, each in the place of the one before."""

    def __init__(self, file: Path) -> None:
        self._file, self._number, self._exchange = file, 0, 0

    def mark(self, text: str, waits: bool = False) -> None:
        """Says where the rank is; waits: it begins to wait for all the others."""
        self._number += 1
        self._exchange += waits
        write_text(self._file, Mark(self._number, self._exchange, waits, text).to_json())


class GlooExchange:
    """The `Exchange` of a process: torch.distributed over gloo. Messages travel as uint8, on the CPU."""

    def __init__(self, rank: int, ranks: int, store: Path, timeout_s: float, progress: Progress) -> None:
        """Returns when all ranks have found each other. Raises `PeerLost`."""
        self.ranks, self.progress, self.calls = ranks, progress, 0
        progress.mark("in the rendezvous", waits=True)
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(store), ranks),
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=timeout_s),
            )
        except RuntimeError as error:
            raise PeerLost("the ranks did not find each other") from error
        progress.mark("connected")

    def all_to_all(self, messages: list[Tensor]) -> list[Tensor]:
        """See `Exchange`. Raises `PeerLost` when another rank is gone."""
        check_messages(messages, self.ranks)
        self.calls += 1
        self.progress.mark(f"in exchange {self.calls}", waits=True)
        lengths = torch.tensor([len(message) for message in messages]).view(torch.uint8)
        their_lengths = torch.empty_like(lengths)
        try:
            dist.all_to_all_single(their_lengths, lengths)
            come = their_lengths.view(torch.int64).tolist()
            received = torch.empty(sum(come), dtype=torch.uint8)
            dist.all_to_all_single(received, torch.cat(messages).cpu(), come, [len(message) for message in messages])
        except RuntimeError as error:
            raise PeerLost(f"exchange {self.calls} broke") from error
        self.progress.mark(f"computing, after exchange {self.calls}")
        return list(received.to(messages[0].device).split(come))

    def leave(self) -> None:
        """Returns when all ranks are here: none closes its connections while another still reads from them."""
        self.progress.mark("in the last barrier", waits=True)
        try:
            dist.barrier()
        except RuntimeError as error:
            raise PeerLost("the last barrier broke") from error
        dist.destroy_process_group()


def run(folder: Path, rank: int, job: dict[str, Any], case: Case, before: Before | None) -> None:
    """Computes the job's case as one rank and writes the result."""
    progress = Progress(folder / f"rank{rank}.mark")
    faulthandler.register(signal.SIGUSR1, _log(folder, rank, "stack"))  # asks a rank that hangs where it is
    progress.mark("started")
    gloo = GlooExchange(rank, case.ranks, folder / "store", job["exchange_timeout_s"], progress)
    exchange = before(gloo, rank) if before else gloo

    made = inputs.make(case, job["device"])
    x, x_sf, topk_idx, topk_weights = (tensors[rank] for tensors in made.arguments()[:4])
    own = (x, x_sf, topk_idx, topk_weights, made.weights)
    progress.mark("computing, with its inputs made")

    def expert_done(done: int, total: int) -> None:
        progress.mark(f"computing, {done} of {total} experts done, after exchange {gloo.calls}")

    result = rank_layer(exchange, rank, dimensions(case, x.device), case.recipe, *own, trace=True, progress=expert_done)
    progress.mark("writing its result")
    write_result(folder, rank, result)
    gloo.leave()


def _log(folder: Path, rank: int, name: str) -> int:
    """The descriptor of a new file of a rank; it stays open as long as the process."""
    return os.open(folder / f"rank{rank}.{name}", os.O_WRONLY | os.O_CREAT, 0o600)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def write_result(folder: Path, rank: int, result: RankResult) -> None:
    """Whole or not at all."""
    tensors = {"y": result.y, "stats": result.stats, "sent": result.sent, **(result.trace or {})}
    unfinished = folder / f"rank{rank}.unfinished"
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, unfinished)
    unfinished.replace(folder / f"rank{rank}.result.safetensors")


# --- processes --------------------------------------------------------------------------------------------------------


def load() -> None:
    """What the template of the ranks does once: all imports, and the compiled arithmetic, by a layer of one token."""
    torch.set_num_threads(1)  # no pool of threads is alive when the ranks are forked
    case = Case(Shape("loads", 128, 128, 1, 1), (1,))
    moe_layer(case.recipe, *inputs.make(case, "cpu").arguments(), trace=True, experts=case.shape.experts)


def be_rank(job: dict[str, Any]) -> NoReturn:
    """The life of a rank, whose output goes to its log. It leaves at once when something raised, so that the others
    see it: no destructor of a library waits for peers.

    job: folder, rank, case (as JSON), exchange_timeout_s, before ('module:function' or None), device.
    """
    folder, rank, status = Path(job["folder"]), job["rank"], 1
    try:
        run(folder, rank, job, case_io.from_json(job["case"]), job["before"] and template.function(job["before"]))
        status = 0
    except BaseException as error:
        report = {"traceback": traceback.format_exc(), "peer_lost": isinstance(error, PeerLost)}
        write_text(folder / f"rank{rank}.error.json", json.dumps(report))
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
