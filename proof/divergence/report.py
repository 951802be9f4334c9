"""A divergence in words, for a terminal of 120 columns."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from megaproof.proof.divergence.find import Divergence

WIDTH = 120
LABEL = 11
ROWS_AROUND, COLUMNS_AROUND = 1, 4


def report(d: Divergence) -> str:
    """The text of a divergence; no line is longer than WIDTH."""
    lines = _wrap(f"first divergence: stage {d.stage} of {d.case_id}", "")
    equal = ", ".join(f"{name} ({count:,})" for name, count in d.compared.items()) or "none"
    lines += _field("equation", d.equation)
    lines += _field("equal", f"{equal}; not shown by the kernel: {', '.join(d.missing) or 'none'}")
    if d.problem:
        return "\n".join([*lines, *_field("problem", d.problem), *_field("explain", d.explain)])
    if d.place is None:
        raise ValueError(f"the divergence of stage {d.stage} has neither a place nor a problem")
    for label, line in zip(("where", "", ""), d.place.text(d.stage, d.granularity), strict=False):
        lines += _field(label, line)
    step = "not comparable (NaN)" if d.ulp < 0 else f"{d.ulp:,} {'apart' if d.format == 'int32' else 'ulp apart'}"
    lines += _field("expected", f"{d.show(d.expected_bits)}   ({d.format})")
    lines += _field("actual", f"{d.show(d.actual_bits)}   ({d.format}), {step}")
    lines += _field("extent", ", ".join(f"{bad:,} of {all_:,} {what}" for what, (bad, all_) in d.extent.items()))
    spread = ", ".join(f"{name}: {count:,}" for name, count in d.ulp_histogram.items())
    lines += _field("ulp", f"at most {d.ulp_max:,}; elements by distance {spread}")
    lines += _field(
        "for show",
        f"calc_diff {d.calc_diff:.2e}, allclose(1e-2) {'true' if d.allclose else 'false'}: "
        + ("a tolerance of 1e-2 passes this" if d.allclose and d.calc_diff < 1e-2 else "never a verdict here"),
    )
    for label, pattern in zip(["pattern"] + [""] * len(d.patterns), d.patterns, strict=False):
        lines += _field(label, f"{pattern.name}: {pattern.text}")
    if not d.patterns:
        lines += _field("pattern", "none of the known ones")
    if d.looked_at:
        lines += _field(
            "", f"(patterns, ulp and calc_diff are of {d.looked_at:,} rows: the stage is too large for all)"
        )
    lines += _field("neighbours", "* differs")
    lines += ["  " + line for line in d.neighbours]
    lines += _field("explain", d.explain)
    return "\n".join(lines)


def neighbours(
    expected: Tensor, actual: Tensor, names: list[str], row: int, column: int, order: list[int], width: int
) -> list[str]:
    """Hex of the elements around [row, column]; order: the row indices above and below it, itself included."""
    at = order.index(row)
    around = order[max(0, at - ROWS_AROUND) : at + ROWS_AROUND + 1]
    first = max(0, min(column - COLUMNS_AROUND, expected.shape[1] - 2 * COLUMNS_AROUND - 1))
    columns = range(first, min(expected.shape[1], first + 2 * COLUMNS_AROUND + 1))
    label = max(len(names[i]) for i in around)
    cell = max(width // 4, len(str(columns[-1]))) + 1
    lines = [" " * (label + 10) + "".join(f"{c:>{cell}} " for c in columns)]
    for i in around:
        for kind, bits in (("expected", expected), ("actual", actual)):
            name = names[i] if kind == "expected" else ""
            marks = (
                f"{f'{int(bits[i, c]):0{width // 4}x}':>{cell}}"
                + ("*" if kind == "actual" and int(expected[i, c]) != int(actual[i, c]) else " ")
                for c in columns
            )
            lines.append(f"{name:<{label}} {kind:<9}" + "".join(marks))
    return [line.rstrip() for line in lines]


def _field(label: str, text: str) -> list[str]:
    return _wrap(text, f"  {label:<{LABEL}}")


def _wrap(text: str, head: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head) or "  ",
        break_on_hyphens=False,
    ) or [head]
