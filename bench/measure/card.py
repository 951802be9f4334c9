"""What nvidia-smi shows of the card while it is measured: SM clock and power, for the run and for each point."""

from __future__ import annotations

import re
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

import torch

from megaproof.toolchain.launch import Device

PERIOD_MS = 50
QUERY = "timestamp,clocks.sm,power.draw.instant"
Figures = dict[str, float | None]
"""clock_mhz, the median; power_w, the maximum; None without a sample."""

_SAMPLE = re.compile(r"^(\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d+), (\d+), ([\d.]+)$", re.MULTILINE)


def figures(samples: str, start: float = 0.0, end: float = float("inf")) -> Figures:
    """nvidia-smi's lines 'time, MHz, W' from start to end, seconds since the epoch -> median clock, maximum power."""
    clocks, watts = [], []
    for stamp, clock, power in _SAMPLE.findall(samples):
        if start <= datetime.strptime(stamp, "%Y/%m/%d %H:%M:%S.%f").timestamp() <= end:
            clocks.append(float(clock))
            watts.append(float(power))
    return {"clock_mhz": statistics.median(clocks) if clocks else None, "power_w": max(watts, default=None)}


@dataclass
class Card:
    """What nvidia-smi wrote; nothing before it has ended, and nothing without one: every figure is then None."""

    samples: str = ""

    def during(self, start: float, end: float) -> Figures:
        """Between two times, seconds since the epoch: an indication, flushes between the launches included."""
        return figures(self.samples, start, end)


@contextmanager
def sampled(device: Device) -> Iterator[Card]:
    """Samples each PERIOD_MS as long as the block runs; they are there once it has ended."""
    card = Card()
    uuid = torch.cuda.get_device_properties(device.index).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    with tempfile.TemporaryFile("w+") as samples:  # a pipe that nobody reads would fill up
        try:
            process = subprocess.Popen([*command, f"--loop-ms={PERIOD_MS}"], stdout=samples, stderr=subprocess.DEVNULL)
        except OSError:
            yield card
            return
        try:
            yield card
        finally:
            process.terminate()
            process.wait()
            samples.seek(0)
            card.samples = samples.read()
