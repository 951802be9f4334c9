"""A run as one page of HTML, complete in itself: no script, no file beside it, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape

from megaproof.proof.record import Record
from megaproof.proof.report import text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; color: #1c1c1c }
h2 { font-size: 1.1em; margin-top: 2em } pre { white-space: pre-wrap; background: #f4f4f4; padding: .7em }
table { border-collapse: collapse } td, th { padding: .15em .6em; border: 1px solid #ddd; text-align: left }
.passed { background: #dff2df } .failed, .error { background: #f6c9c6 } .skipped, .xfailed { background: #eee }
"""


def page(record: Record) -> str:
    """The whole document."""
    sections = [f"<h2>{escape(title)}</h2>\n<pre>{_lines(lines)}</pre>" for title, lines in text.whole(record)]
    verdict = "green" if record.exit_status == 0 else "not green"
    body = "\n".join(
        [f"<h1>megaproof: {verdict}</h1>", *sections[:2], *_verdicts(record), *sections[2:], *_slow(record)]
    )
    head = f'<meta charset="utf-8"><title>megaproof: {verdict}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _lines(lines: Iterable[str]) -> str:
    return escape("\n".join(lines))


def _verdicts(record: Record) -> Iterator[str]:
    """One row a case, one column a check."""
    verdicts = record.verdicts()
    checks = list(dict.fromkeys(check for found in verdicts.values() for check in found))
    if not checks:
        return
    head = "".join(f"<th>{escape(check.removeprefix('test_').replace('_', ' '))}</th>" for check in checks)
    yield f"<h2>verdicts by case and check</h2>\n<table><tr><th>case</th>{head}</tr>"
    for case, found in verdicts.items():
        cells = "".join(_cell(found.get(check, "")) for check in checks)
        yield f"<tr><td>{escape(case)}</td>{cells}</tr>"
    yield "</table>"


def _cell(outcome: str) -> str:
    return f'<td class="{outcome}">{outcome}</td>'


def _slow(record: Record, most: int = 20) -> Iterator[str]:
    """The tests that took longest."""
    slow = sorted(record.tests.values(), key=lambda test: -test.seconds)[:most]
    yield f"<h2>slowest tests</h2>\n<pre>{_lines(f'{test.seconds:8.1f} s  {test.id}' for test in slow)}</pre>"
