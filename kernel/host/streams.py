"""The order of launches on one buffer, by thread and by stream: each needs the counters that the one before leaves."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch

from megaproof.kernel.host.sizes import ConfigError
from megaproof.toolchain.launch import capture_of, current_stream, wait_for

_follow_frames = getattr(torch._C._dynamo.eval_frame, "set_eval_frame", lambda callback: None)
"""Sets what torch.compile does with each Python frame of this thread, and returns what it was; None: nothing."""


class Turn:
    """A lock. Inside, torch.compile follows nothing: a call out of a compiled function runs as it is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._followed: Any = None

    def __enter__(self) -> None:
        self._lock.acquire()
        self._followed = _follow_frames(None) if "torch._dynamo" in sys.modules else None

    def __exit__(self, *exception: object) -> None:
        if self._followed is not None:
            _follow_frames(self._followed)
        self._lock.release()


class StreamOrder:
    """Puts every launch on a buffer behind the one before it, on whatever streams the two are made.

    While the stream stays, nothing is done. Where another one comes, it waits for all that the last one was given so
    far. A capture launches nothing, so it waits for nothing outside of it: launches in one graph are put in order among
    themselves, and when the graph is replayed beside other launches, the caller orders the two.
    """

    def __init__(self) -> None:
        self.stream: int | None = None
        """Of the last launch that was not captured."""
        self.captured: tuple[int, int] | None = None
        """Number of the last capture, and the stream of its last launch; None when its end was seen."""

    def enter(self, device: int) -> int:
        """Called before each launch, by one thread at a time; returns the current stream.

        Raises ConfigError where there can be no order.
        """
        stream = current_stream(device)
        if stream == self.stream and self.captured is None:
            return stream
        capture = capture_of(stream, device)
        if self.stream not in (None, stream):
            before = capture_of(self.stream, device)
            if before == capture:
                wait_for(stream, self.stream, device)
            elif before and not capture:
                raise ConfigError(
                    "sym_buffer was last used on a stream that is now in a CUDA graph capture, so nothing can wait for "
                    "it; launches on another stream must come after the capture"
                )
        if capture:
            if self.captured is not None and self.captured[0] == capture and self.captured[1] != stream:
                wait_for(stream, self.captured[1], device)
            self.captured = capture, stream
            return stream
        if self.captured is not None and capture_of(self.captured[1], device) != self.captured[0]:
            self.captured = None
        self.stream = stream
        return stream
