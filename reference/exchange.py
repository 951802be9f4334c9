"""How ranks talk: each rank sends some bytes to each rank. Here is also one way to do it, all ranks in one process.

The layer as one rank sees it (`reference/ranks.py`) knows nothing but this protocol; `proof/worlds/rank_process.py`
implements it between processes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ExchangeError(RuntimeError):
    """Messages that do not fit together: a wrong length, a row or an exchange that another rank does not know."""


class Exchange(Protocol):
    """How one rank reaches the others."""

    def all_to_all(self, messages: list[Tensor]) -> list[Tensor]:
        """Sends messages[d] to rank d and returns what came from each rank, by rank; uint8 [any length, 0 included].

        It returns when every rank has sent. All ranks call it equally often.
        """
        ...


def pack(*columns: Tensor) -> Tensor:
    """Returns the bytes of m rows, row by row: uint8 [m * bytes of a row]. columns: [m, w] each, w >= 1, any dtype."""
    return torch.cat([column.contiguous().view(torch.uint8) for column in columns], dim=1).flatten()


def unpack(message: Tensor, *columns: tuple[torch.dtype, int]) -> list[Tensor]:
    """Inverse of `pack`. columns: dtype and width of each. Raises `ExchangeError` if the last row is cut off."""
    sizes = [dtype.itemsize * width for dtype, width in columns]
    if message.dtype != torch.uint8 or message.numel() % sum(sizes):
        raise ExchangeError(
            f"a message of {message.numel()} {message.dtype} is no number of rows of {sum(sizes)} bytes"
        )
    parts = message.reshape(-1, sum(sizes)).split(sizes, dim=1)
    # A copy of its own for each part: a view as a wider type needs an aligned start.
    copies = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    return [copy.view(dtype) for copy, (dtype, _) in zip(copies, columns, strict=True)]


def check_messages(messages: Sequence[Tensor], ranks: int) -> None:
    """Raises `ExchangeError` unless there is one flat tensor of uint8 for each rank."""
    if len(messages) != ranks:
        raise ExchangeError(f"{len(messages)} messages for {ranks} ranks; one for each, this one included")
    for rank, message in enumerate(messages):
        if message.dtype != torch.uint8 or message.dim() != 1:
            raise ExchangeError(f"the message to rank {rank} is {message.dtype} {list(message.shape)}, not uint8 [n]")


# --- all ranks in one process -----------------------------------------------------------------------------------------


def lockstep(ranks: int, work: Callable[[Exchange, int], T]) -> list[T]:
    """Runs work(exchange, rank) of every rank in one process; returns the results by rank.

    Each rank has a thread, and one of them runs at a time, in rank order from one exchange to the next: the same order
    of events in every run, and no more memory than one rank needs. The first exception of a rank ends all the others
    and is raised, with a note that names the rank.
    """
    turns, results = _Turns(ranks), [None] * ranks
    threads = [
        threading.Thread(target=_run, args=(turns, rank, work, results), name=f"rank {rank}", daemon=True)
        for rank in range(ranks)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:  # an interrupt of the caller: no rank goes past its next exchange
        turns.fail(error)
        raise
    if turns.failure is not None:
        raise turns.failure
    return results  # type: ignore[return-value]


class _Stopped(BaseException):
    """Ends a rank because another one failed."""


class _Turns:
    """Which rank may run, and the messages on their way."""

    def __init__(self, ranks: int) -> None:
        self.live = list(range(ranks))
        self.turn = 0
        self.failure: BaseException | None = None
        self.mail: list[list[deque[Tensor]]] = [[deque() for _ in range(ranks)] for _ in range(ranks)]  # [to][from]
        self.changed = threading.Condition()

    def wait(self, rank: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.failure is not None or self.turn == rank)
            if self.failure is not None:
                raise _Stopped

    def pass_on(self, rank: int) -> None:
        with self.changed:
            later = [other for other in self.live if other > rank]
            self.turn = (later or self.live or [rank])[0]
            self.changed.notify_all()

    def leave(self, rank: int) -> None:
        self.live.remove(rank)
        self.pass_on(rank)

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()


class _Member:
    """The `Exchange` of one rank."""

    def __init__(self, turns: _Turns, rank: int) -> None:
        self.turns, self.rank = turns, rank

    def all_to_all(self, messages: list[Tensor]) -> list[Tensor]:
        turns, rank = self.turns, self.rank
        check_messages(messages, len(turns.mail))
        for to, message in enumerate(messages):
            turns.mail[to][rank].append(message)
        turns.pass_on(rank)
        turns.wait(rank)  # its turn comes again when every other rank has sent, or is gone
        for source, box in enumerate(turns.mail[rank]):
            if not box:
                raise ExchangeError(f"rank {source} ended before the exchange that rank {rank} is in")
        return [box.popleft() for box in turns.mail[rank]]


def _run(turns: _Turns, rank: int, work: Callable[[Exchange, int], Any], results: list[Any]) -> None:
    try:
        turns.wait(rank)
        results[rank] = work(_Member(turns, rank), rank)
        turns.leave(rank)
    except _Stopped:
        pass
    except BaseException as error:  # whatever it is, it is raised in the caller's thread
        error.add_note(f"in rank {rank} of {len(turns.mail)}")
        turns.fail(error)
