"""The file of pins: what it holds, what it catches, and what it says then."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megaproof.tests.support.texts import PLAIN
from megaproof.toolchain import build, pins
from megaproof.toolchain.errors import BuildError
from megaproof.toolchain.pins import Pins
from megaproof.toolchain.program import Program


def test_pins_catch_and_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = Pins(tmp_path / "cubins.json", renew="python -m this --pin")
    one, two, three = ({"cubin": name, "code": {"entry": name}} for name in "abc")
    pinned = {"one": one, "two": two}
    pins.write(pinned)
    pins.check(pinned)
    assert pins.code() == {"one": {"entry": "a"}, "two": {"entry": "b"}}
    assert [path.name for path in tmp_path.iterdir()] == ["cubins.json"], "no temporary file is left"
    other_cubin, other_code = two | {"cubin": "c"}, two | {"code": three["code"]}
    for other in (pinned | {"two": other_cubin}, pinned | {"two": other_code}, {"one": one}, pinned | {"three": three}):
        with pytest.raises(BuildError, match=r"cubins of t\w+ are not .*python -m this --pin"):
            pins.check(other)
    monkeypatch.setattr(build, "nvrtc_version", lambda: "13.0.1")
    for act in (pins.check, pins.write):
        with pytest.raises(BuildError, match=r"NVRTC is 13\.0\.1 .*install nvidia-cuda-nvrtc==13\.0\.88"):
            act(pinned)


def test_only_what_is_pinned_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cubin, note and digests can all be replaced in a cache; what is loaded was gated here, or is pinned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_OWN", {})
    (tmp_path / "plain.cu").write_text(PLAIN)
    program = Program("plain", (tmp_path / "plain.cu",), ("plain",))
    built = build.build(program.text(), program.entries)
    build._OWN.clear()
    assert build.build(program.text()).cached, "it lies in the cache"
    assert not program.compile().cached
    pinned = Pins(tmp_path / "cubins.json", renew="")
    pinned.write({"any name": built.pin()})
    monkeypatch.setattr(pins, "FILES", [pinned])
    assert program.compile().cached
    assert not program.with_defines(OTHER=1).compile().cached
    assert not pinned.holds(dataclasses.replace(built, cubin=built.cubin + b"other", sha256="0" * 64))
