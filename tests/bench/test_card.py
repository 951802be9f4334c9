"""What nvidia-smi writes, read: the clock and power of a run and of a while. No GPU."""

from __future__ import annotations

from datetime import datetime

from megaproof.bench.measure import card


def test_samples_of_the_card() -> None:
    lines = ("1.000, 1980, 650.5", "2.000, 1200, 701.25", "3.000, [N/A], [N/A]", "4.000, 1500, 640.00", "5.000, 16")
    samples = "\n".join(f"2026/11/24 11:00:0{line}" for line in lines)
    assert card.figures(samples) == {"clock_mhz": 1500.0, "power_w": 701.25}
    nothing = {"clock_mhz": None, "power_w": None}
    assert card.figures("[N/A], 300.0\n") == card.Card().during(0.0, 1e12) == nothing


def test_samples_of_a_while() -> None:
    samples = (
        "2026/11/24 11:00:01.000, 1980, 300\n2026/11/24 11:00:02.500, 1300, 690\n2026/11/24 11:00:04.000, 1900, 400\n"
    )
    at = datetime(2026, 11, 24, 11, 0, 2).timestamp()
    assert (
        card.figures(samples, at, at + 1)
        == card.Card(samples).during(at, at + 1)
        == {"clock_mhz": 1300.0, "power_w": 690.0}
    )
