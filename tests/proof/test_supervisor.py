"""Who is named when a run of ranks goes wrong, and when: shown views, and a clock that the test moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest

from megaproof.proof.worlds.supervisor import LONGEST_LOOK_S, Finding, Limits, Mark, Supervisor, View, status

LIMITS = Limits(start_s=40, quiet_s=20, whole_s=1000, echo_s=5)
FRESH = View()
DONE = View(Mark(9, 4, True, "in the last barrier"), code=0, result=True)

Found = Finding | Literal["done"] | None


class Scene:
    """A supervisor, what it is shown, and its clock."""

    def __init__(self, ranks: int, limits: Limits = LIMITS) -> None:
        self.now, self.views, self.marks = 100.0, [FRESH] * ranks, 0
        self.supervisor = Supervisor(limits, lambda: self.now)

    def computes(self, rank: int, exchange: int = 2, text: str = "computing, after exchange 1") -> None:
        self._mark(rank, exchange, False, text)

    def waits(self, rank: int, exchange: int = 3, text: str = "in exchange 2") -> None:
        self._mark(rank, exchange, True, text)

    def _mark(self, rank: int, exchange: int, waits: bool, text: str) -> None:
        self.marks += 1
        self.views[rank] = View(Mark(self.marks, exchange, waits, text))

    def look(self, lost: bool = False) -> Found:
        return self.supervisor.look(self.views, lost)

    def during(self, seconds: int) -> list[Found]:
        """One look a second."""
        found = []
        for _ in range(seconds):
            self.now += 1
            found.append(self.look())
        return found


def named(found: Found) -> tuple[int, str]:
    assert isinstance(found, Finding), found
    return found.rank, found.kind


# --- nothing is wrong -------------------------------------------------------------------------------------------------


def test_a_run_that_ends_well() -> None:
    scene = Scene(2)
    assert scene.look() is None
    scene.computes(0)
    scene.waits(1)
    assert scene.during(1) == [None]
    scene.views = [DONE, DONE]
    assert scene.look() == "done"
    assert scene.look(lost=True) == "done", "what forked them is not needed any more"


def test_a_start_that_is_slow_for_all_convicts_nobody() -> None:
    scene = Scene(3)
    scene.look()
    assert scene.during(39) == [None] * 39
    for rank in range(3):
        scene.computes(rank, 0, "started")
    assert scene.during(19) == [None] * 19, "silence counts from the first mark"


def test_a_rank_that_gets_on_slowly_convicts_nobody() -> None:
    """A second before each limit it leaves a mark; the other one waits for it the whole time."""
    scene = Scene(2)
    scene.waits(0)
    for done in range(30):
        scene.computes(1, text=f"computing, {done} of 30 experts done")
        assert scene.during(19) == [None] * 19


def test_the_same_words_again_are_progress() -> None:
    scene = Scene(1)
    for _ in range(3):
        scene.computes(0, text="computing")
        assert scene.during(19) == [None] * 19


def test_time_in_which_nobody_looked_does_not_count() -> None:
    """A supervisor that was starved, or a machine that was suspended for an hour."""
    scene = Scene(2)
    scene.computes(0)
    scene.computes(1)
    scene.look()
    for _ in range(19):
        scene.now += 3600
        assert scene.look() is None
    assert LONGEST_LOOK_S == 1
    assert named(scene.during(1)[0]) == (0, "hung")


def test_ranks_that_wait_together_wait_since_the_last_came() -> None:
    scene = Scene(2)
    scene.computes(1)
    scene.waits(0)
    assert scene.during(19) == [None] * 19
    scene.waits(1)
    assert scene.during(19) == [None] * 19, "the first of them has waited for 38 s, and not in vain"


# --- a rank that does not get on --------------------------------------------------------------------------------------


def test_one_that_has_not_started_is_named_as_that() -> None:
    scene = Scene(3)
    scene.look()
    for rank in (0, 2):
        scene.waits(rank, 1, "in the rendezvous")
    *quiet, last = scene.during(40)
    assert quiet == [None] * 39
    assert last == Finding(1, "hung", "has not started after 40 s")


def test_if_none_has_started_the_first_is_named() -> None:
    scene = Scene(3)
    scene.look()
    assert scene.during(40)[-1] == Finding(0, "hung", "has not started after 40 s")


@pytest.mark.parametrize("rank", range(3))
def test_a_hang_is_of_the_rank_that_the_others_wait_for(rank: int) -> None:
    scene = Scene(3)
    for other in range(3):
        scene.computes(other, text="computing, 3 of 8 experts done, after exchange 1")
    scene.look()
    assert scene.during(10) == [None] * 10
    for other in {0, 1, 2} - {rank}:
        scene.waits(other)
    *quiet, last = scene.during(10)
    assert quiet == [None] * 9
    how = "no progress for 20 s, computing, 3 of 8 experts done, after exchange 1"
    assert last == Finding(rank, "hung", how)


def test_a_hang_is_seen_while_another_rank_gets_on() -> None:
    """Rank 0 has not come as far, and leaves marks: it is the silent one that hangs."""
    scene = Scene(3)
    scene.computes(1, exchange=3)
    scene.waits(2, exchange=4)
    scene.look()
    for done in range(19):
        scene.computes(0, exchange=1, text=f"{done} of 99 experts done")
        assert scene.during(1) == [None]
    scene.computes(0, exchange=1, text="20 of 99 experts done")
    assert named(scene.during(1)[0]) == (1, "hung")


def test_of_two_that_hang_the_one_that_is_less_far() -> None:
    scene = Scene(2)
    scene.computes(0, exchange=3)
    scene.computes(1, exchange=2)
    assert named(scene.during(21)[-1]) == (1, "hung")


def test_one_that_hangs_inside_an_exchange() -> None:
    """All wait: the one in the earliest exchange."""
    scene = Scene(3)
    for rank, exchange in enumerate((3, 2, 3)):
        scene.waits(rank, exchange, f"in exchange {exchange - 1}")
    *_, last = scene.during(21)
    assert last == Finding(1, "hung", "no progress for 20 s, in exchange 1")


@pytest.mark.parametrize("waits", [False, True])
def test_one_that_is_stopped_is_named_as_that(waits: bool) -> None:
    """Inside an exchange all look alike, but for the word of the operating system."""
    scene = Scene(3)
    for rank in range(3):
        scene.waits(rank)
    if not waits:
        scene.computes(1)
    scene.views[1] = View(scene.views[1].mark, stopped=True)
    *quiet, last = scene.during(21)
    assert quiet == [None] * 20
    assert named(last) == (1, "hung")
    assert "and its process is stopped" in last.how


def test_a_stop_and_a_continuation_are_no_progress() -> None:
    scene = Scene(1)
    scene.computes(0)
    scene.look()
    for second in range(19):
        scene.views[0] = View(scene.views[0].mark, stopped=second % 2 == 0)
        assert scene.during(1) == [None]
    assert named(scene.during(1)[0]) == (0, "hung")


def test_a_run_that_gets_on_and_takes_too_long_is_late() -> None:
    scene = Scene(2)
    scene.waits(0)
    found: list[Found] = []
    for done in range(101):
        scene.computes(1, text=f"computing, {done} of 500 experts done")
        found += scene.during(10)
    assert found[:1000] == [None] * 1000
    assert found[1000] == Finding(1, "late", "the run has not ended after 1000 s; computing, 100 of 500 experts done")


# --- a rank that ends -------------------------------------------------------------------------------------------------


def test_a_raise_is_named_at_once() -> None:
    scene = Scene(3)
    for rank in range(3):
        scene.waits(rank)
    scene.views[1] = View(scene.views[1].mark, code=1, raised="OverflowError: too much")
    assert scene.look() == Finding(1, "raised", "OverflowError: too much")


def test_a_death_is_named_at_once() -> None:
    scene = Scene(2)
    scene.computes(0, text="computing, 3 of 8 experts done")
    scene.views[0] = View(scene.views[0].mark, code=-9)
    assert scene.look() == Finding(0, "died", "signal SIGKILL, computing, 3 of 8 experts done")


def test_one_that_dies_before_its_first_mark() -> None:
    scene = Scene(2)
    scene.views[1] = View(code=-11)
    assert scene.look() == Finding(1, "died", "signal SIGSEGV, has not started")


def test_status_0_without_a_result_is_a_death() -> None:
    scene = Scene(2)
    scene.views = [DONE, View(DONE.mark, code=0)]
    assert scene.look() == Finding(1, "died", "exit status 0, in the last barrier")


def echoes(scene: Scene, ranks: Sequence[int]) -> None:
    for rank in ranks:
        scene.views[rank] = View(scene.views[rank].mark, code=1, raised="PeerLost: exchange 2 broke", echo=True)


def test_the_cause_is_named_and_not_its_echo() -> None:
    """The ranks that lost their peer are seen to end first; the peer's own end is seen later, however slowly."""
    scene = Scene(3)
    for rank in range(3):
        scene.waits(rank)
    echoes(scene, [0])
    assert scene.during(4) == [None] * 4
    echoes(scene, [0, 1])
    assert scene.during(4) == [None] * 4, "another end is news, so the wait begins again"
    scene.views[2] = View(scene.views[2].mark, code=-9)
    assert named(scene.look()) == (2, "died")


def test_an_echo_is_named_where_no_cause_comes() -> None:
    scene = Scene(2)
    for rank in range(2):
        scene.waits(rank)
    scene.look()
    echoes(scene, [0])
    *quiet, last = scene.during(7)
    assert None in quiet
    assert last == Finding(0, "raised", "PeerLost: exchange 2 broke")
    echoes(scene, [0, 1])
    assert named(scene.look()) == (0, "raised"), "at once, when all have ended"


def test_the_end_of_the_process_that_forks_the_ranks() -> None:
    scene = Scene(2)
    scene.views[0] = DONE
    found = scene.look(lost=True)
    assert found == Finding(1, "died", "the process that forks the ranks has ended, and they with it")


# --- marks ------------------------------------------------------------------------------------------------------------


def test_a_mark_survives_its_file() -> None:
    mark = Mark(3, 2, True, "in exchange 1")
    assert Mark.from_json(mark.to_json()) == mark
    with pytest.raises((TypeError, ValueError)):
        Mark.from_json("{}")


def test_a_status_in_words() -> None:
    assert (status(1), status(-9)) == ("exit status 1", "signal SIGKILL")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), -float("inf")])
def test_a_limit_that_is_no_time_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"whole_s = {value} must be more than 0 seconds"):
        Limits(whole_s=value)


def test_no_limit_is_never_reached() -> None:
    scene = Scene(1, Limits(whole_s=float("inf"), quiet_s=float("inf")))
    scene.computes(0)
    assert scene.during(5000) == [None] * 5000
