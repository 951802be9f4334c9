"""What the summary says of the elements that were compared."""

from __future__ import annotations

from megaproof.proof import tally
from megaproof.quant.recipe import RECIPES
from megaproof.reference.stages import STAGES


def test_an_element_has_the_same_bytes_under_every_recipe() -> None:
    """A tally does not know under which recipe its elements were compared."""
    for recipe in RECIPES.values():
        assert {name: stage.format(recipe).bytes for name, stage in STAGES.items()} == tally.element_bytes()


def test_counts_add_up_and_are_taken_once() -> None:
    before = tally.take()
    tally.add("ours", {"y": 3, "slots": 0}, 2)
    tally.add("ours", {"y": 4, "stats": 5}, 1)
    tally.add("theirs", {"l1_acts_sf": 1}, 3)
    taken = tally.take()
    assert taken == {"ours": {"launches": 3, "y": 7, "stats": 5}, "theirs": {"launches": 3, "l1_acts_sf": 1}}
    assert tally.take() == {}
    total: tally.Tally = {}
    tally.merge(total, taken)
    tally.merge(total, taken)
    assert tally.lines(total) == [
        "ours: 6 launches, 68 bytes, elements by stage: y 14, stats 10; 0 differ",
        "theirs: 6 launches, 8 bytes, elements by stage: l1_acts_sf 2; 0 differ",
    ]
    tally.merge(tally._found, before)  # this test's own, of a proof before it
