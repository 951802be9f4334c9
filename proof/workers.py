"""Workers of pytest-xdist: which of them runs what, and that a test that ends its worker is run once.

pytest-xdist 3.8 puts a crashed worker's unfinished scope back whole, the test that crashed it included, and so would
run it again in each new worker.
"""

from __future__ import annotations

from typing import Any

import pytest


class CrashedOnce:
    """In front of `LoadScopeScheduling` or a class made from it."""

    def remove_node(self, node: Any) -> str | None:
        """The test that the worker was in, if it was in one, which counts as done; the rest is for the others."""
        workload = self.assigned_work.pop(node)  # type: ignore[attr-defined]
        pending = [(unit, name) for unit in workload.values() for name, done in unit.items() if not done]
        if not pending:
            return None
        unit, crashed = pending[0]
        unit[crashed] = True
        left = {scope: unit for scope, unit in workload.items() if not all(unit.values())}
        self.workqueue.update(left)  # type: ignore[attr-defined]
        for other in self.assigned_work:  # type: ignore[attr-defined]
            self._reschedule(other)  # type: ignore[attr-defined]
        return crashed


def scheduler(config: pytest.Config, log: Any, chosen: str | None) -> Any | None:
    """A scheduler for what the command line says of `--dist`, or None where pytest-xdist's own is right.

    chosen: None: nothing is said. Then all proofs of a case run on one worker, so that each case is computed once; and
    so do all tests of a file that the ini option `one_worker` names, since they share what is made once a process.
    `--dist loadgroup` would be pytest-xdist's own way; xdist 3.8 marks the groups in a field that pytest 9.2 lacks.
    """
    from xdist import scheduler as own

    together = set(config.getini("one_worker"))

    class ByCase(CrashedOnce, own.LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, name = nodeid.partition("::")
            if file in together:
                return file
            return f"{file}::{name[name.index('[') :]}" if name.endswith("]") else nodeid

    class ByScope(CrashedOnce, own.LoadScopeScheduling):
        pass

    class ByFile(CrashedOnce, own.LoadFileScheduling):
        pass

    class ByGroup(CrashedOnce, own.LoadGroupScheduling):
        pass

    made = {None: ByCase, "loadscope": ByScope, "loadfile": ByFile, "loadgroup": ByGroup}.get(chosen)
    return made and made(config, log)
