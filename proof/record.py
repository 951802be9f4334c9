"""The record of a run: one JSON value from which every view of the run is made.

A run writes it to reports/run.json at its end, however that comes about, whole or not at all. With pytest-xdist the
controller keeps it and the workers add what they alone know.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megaproof.proof import header, tally
from megaproof.proof.options import DEFAULT_KERNEL, LISTING, asks
from megaproof.toolchain.files import replace

FORMAT = 1
"""Version of the layout; a reader refuses another."""
NAME = "run.json"
NOT_CLAIMED = "not claimed"
"""Start of the skip of a recipe that an adapter says it can't run: a statement about the kernel, not a missing GPU."""


class RecordError(ValueError):
    """A record that can't be read; names the file and the reason."""


@dataclass
class Test:
    """One test, over its phases."""

    id: str
    """pytest's."""
    outcome: str = ""
    """'passed', 'failed', 'error' (before or after the test itself), 'skipped', 'xfailed'; '' while it runs."""
    case: str | None = None
    """The id of the case that it was run on."""
    seconds: float = 0.0
    skip: str = ""
    """Why it was skipped."""
    kernel: str = ""
    """The kernel that it compared with the reference, and in what."""
    properties: dict[str, Any] = field(default_factory=dict)
    """What else the test recorded."""
    reproduce: list[str] = field(default_factory=list)

    @property
    def check(self) -> str:
        """The test's name without its parameters."""
        return self.id.rpartition("::")[2].partition("[")[0]


@dataclass
class Record:
    """A run, as far as it has come."""

    begun: float = field(default_factory=time.time)
    """Seconds since 1970."""
    seconds: float = 0.0
    command: list[str] = field(default_factory=list)
    """pytest's arguments."""
    options: dict[str, Any] = field(default_factory=dict)
    """See `header.options`."""
    versions: dict[str, str] = field(default_factory=dict)
    """See `header.versions`."""
    described: dict[str, str] = field(default_factory=dict)
    """See `header.describe`; empty where the run was asked for no header."""
    selected: dict[str, int] = field(default_factory=dict)
    """See `selection.count`."""
    kernel_named: bool = False
    """Whether --kernel names another kernel than the default."""
    listed_only: bool = False
    """Whether tests were collected and not run."""
    dropped: int = 0
    """Tests on cases that --ranks left out."""
    tests: dict[str, Test] = field(default_factory=dict)
    """By id, in the order in which they began."""
    compared: int = 0
    """Tests that passed or failed, which is what compares; an error of a fixture counts as one."""
    kernel_proofs: int = 0
    """Those that compared a kernel, and all that failed."""
    on_cases: int = 0
    """Those on cases."""
    skips: dict[str, int] = field(default_factory=dict)
    """How often each reason was given."""
    tally: tally.Tally = field(default_factory=dict)
    """What was compared and equal."""
    reproduce: list[str] = field(default_factory=list)
    """A command for each failure, those of files that can't be collected included."""
    nonce: str = ""
    """That of --nonce: says that a record is of the run that was asked for it, and not of an earlier one."""
    lost: list[str] = field(default_factory=list)
    """Processes of the run that ended before it, a sentence each."""
    disagree: list[str] = field(default_factory=list)
    """Ids of tests that were run more than once, with different outcomes."""
    interrupted: bool = False
    """Whether the run was ended from inside or by the keyboard, whatever status that gave it."""
    names: list[str] = field(default_factory=list)
    """See `loaded.problems`."""
    exit_status: int | None = None
    """pytest's; None: the run has not ended."""
    unproven: str = ""
    """Why the run proves nothing, and is not green even without a failure; '' if it compared what it had to."""

    @classmethod
    def of(cls, config: pytest.Config) -> Record:
        """The record of a run that begins."""
        return cls(
            command=list(config.invocation_params.args),
            options=header.options(config),
            versions=header.versions(),
            nonce=config.option.nonce,
            kernel_named=config.option.kernel != DEFAULT_KERNEL,
            listed_only=config.option.collectonly and asks(config, *LISTING),
        )

    def verdicts(self) -> dict[str, dict[str, str]]:
        """Case id -> check -> outcome, of the tests on cases."""
        found: dict[str, dict[str, str]] = {}
        for test in self.tests.values():
            if test.case is not None:
                found.setdefault(test.case, {})[test.check] = test.outcome
        return found

    def outcomes(self) -> Counter[str]:
        """How many tests ended in which way."""
        return Counter(test.outcome for test in self.tests.values())

    def to_json(self) -> str:
        """One JSON object; inverse of `from_json`."""
        values = dataclasses.asdict(self)
        values["tests"] = list(values["tests"].values())
        return json.dumps({"record": FORMAT, "verdicts": self.verdicts(), **values}, indent=1, default=str) + "\n"

    def write(self, folder: Path) -> Path:
        """Writes the record into a folder, which is made if need be, and returns its path. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / NAME
        replace(path, self.to_json().encode())
        return path


def missing(found: Record, nonce: str) -> str:
    """Why a record is not that of a whole green run which was given this nonce, or ''."""
    if found.nonce != nonce:
        return "it is of another run: the run that was asked for has left none"
    if found.exit_status != 0 or found.unproven or found.lost or found.disagree or found.names:
        return f"the run ended with status {found.exit_status}, or something was wrong beside its tests"
    outcomes = found.outcomes()
    if wrong := {name for name in outcomes if name not in ("passed", "skipped", "xfailed")}:
        return f"tests of it are {', '.join(sorted(name or 'unfinished' for name in wrong))}"
    if not 0 < outcomes["passed"] == found.compared:
        return f"it counts {found.compared} tests that compared, and holds {outcomes['passed']} that passed"
    if found.selected.get("tests", 0) != len(found.tests):
        return f"{found.selected.get('tests', 0)} tests were selected, and it holds {len(found.tests)}"
    return ""


def read(path: Path) -> Record:
    """The record in a file. Raises `RecordError`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("record") != FORMAT:
            raise RecordError(f"{path} is a record of another version; this one reads {FORMAT}")
        values.pop("verdicts")
        tests = [Test(**test) for test in values.pop("tests")]
        return Record(**values, tests={test.id: test for test in tests})
    except OSError as error:
        raise RecordError(f"{path} can't be read: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{path} is no record of a run: {type(error).__name__}: {error}") from error
