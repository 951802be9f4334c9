"""--require-pinned: an edited kernel, or another compiler's, is refused at the start; without it the header says so."""

from __future__ import annotations

import pytest

from megaproof.proof import header, options
from megaproof.toolchain.errors import EnvironmentMissing


def test_what_is_not_pinned_is_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "unpinned", lambda: ["moe"])
    with pytest.raises(pytest.exit.Exception, match="the cubins of moe are not pinned") as ended:
        options._check_pinned()
    assert ended.value.returncode == 1
    monkeypatch.setattr(header, "no_gpu", lambda: None)
    assert header._cubins() == "cubins: NOT PINNED: moe"
    monkeypatch.setattr(header, "unpinned", list)
    options._check_pinned()
    assert header._cubins() == "cubins: pinned"


def test_without_a_compiler_it_is_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise EnvironmentMissing("NVRTC is not there")

    monkeypatch.setattr(header, "unpinned", missing)
    with pytest.raises(pytest.exit.Exception, match="NVRTC is not there") as ended:
        options._check_pinned()
    assert ended.value.returncode == options.EXIT_ENVIRONMENT


def test_an_edited_program_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin is the quickest of them to compile."""
    from megaproof.kernel import programs

    monkeypatch.setattr(header, "LAUNCHED", ("twin",))
    assert header.unpinned() == []
    edited = programs.PROGRAMS["twin"].edited(lambda text: text + "__device__ int edited = 1;")
    monkeypatch.setitem(programs.PROGRAMS, "twin", edited)
    assert header.unpinned() == ["twin"]
