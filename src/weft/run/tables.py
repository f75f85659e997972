"""An estimate for people: tables of text, and of HTML.

Names in it may come from a server or from a file: no character in them acts on a terminal or a
page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from weft.graph.check import ACTING

from .price import short

if TYPE_CHECKING:
    from .estimate import Estimate, Forward, Line, Visit

Row = tuple[str, ...]

_LINES = ("line", "operations", "flops", "makes", "saves", "does")
_VISITS = ("site", "holds", "bytes", "is")
_NUMBERS = frozenset(("operations", "flops", "makes", "saves", "bytes"))


def text(found: Estimate) -> str:
    """The sums, the lines of the block, the sites in firing order."""
    sums = [f"{name:<12} {_still(text)}" for name, text in _sums(found)]
    tables: list[tuple[Row, list[Row]]] = [(_LINES, [_line(one) for one in found.lines])]
    tables.append((_VISITS, [_visit(one) for one in found.visits]))
    return "\n\n".join(["\n".join(sums), *[_aligned(head, rows) for head, rows in tables if rows]])


def page(found: Estimate) -> str:
    """The same as HTML; the text of the user's lines stands beside them."""
    head = (*_LINES, "text")
    lines = [(*_line(one), one.where.text if one.where else "") for one in found.lines]
    visits = [_visit(one) for one in found.visits]
    parts = [_table((), _sums(found))]
    parts += [_table(head, lines)] if lines else []
    parts += [_table(_VISITS, visits)] if visits else []
    return f'<div class="weft-plan">{"".join(parts)}</div>'


def _sums(found: Estimate) -> list[tuple[str, str]]:
    passes = found.forwards
    several = len(passes) > 1 or any(len(one.invokes) > 1 for one in passes)
    return [*found.price.rows(), *([("passes", passes_text(passes))] if several else [])]


def passes_text(forwards: Iterable[Forward]) -> str:
    """`0 and 2 share one; 1 alone`; of generations `0 and 2 share steps; 1 alone`."""
    return "; ".join([_forward(one) for one in forwards]) or "none"


def _forward(one: Forward) -> str:
    named = [str(number) for number in one.invokes]
    if len(named) == 1:
        return f"{named[0]} alone"
    listed = f"{', '.join(named[:-1])} and {named[-1]}"
    if one.shared:
        return f"{listed} share {'steps' if one.steps else 'one'}"
    return f"{listed} take turns, each with its own"


def _line(one: Line) -> Row:
    at = "?" if one.where is None else f"{_file(one.where.file)}:{one.where.line}"
    figures = (short(one.flops, 1000, ""), short(one.made, 1024, "B"), short(one.saved, 1024, "B"))
    return (at, str(one.operations), *figures, "; ".join(one.does))


def _visit(one: Visit) -> Row:
    return (
        str(one.site),
        ", ".join(one.types),
        short(one.bytes, 1024, "B"),
        ", ".join(one.does),
    )


def _file(name: str) -> str:
    return name.replace(chr(92), "/").rsplit("/", 1)[-1]


def _aligned(head: Sequence[str], rows: Sequence[Row]) -> str:
    shown = [[_still(cell) for cell in row] for row in (tuple(head), *rows)]
    widths = [max([len(row[place]) for row in shown]) for place in range(len(head))]
    lines = []
    for row in shown:
        cells = [
            cell.rjust(width) if name in _NUMBERS else cell.ljust(width)
            for cell, width, name in zip(row, widths, head, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Row]) -> str:
    top = "".join([f"<th>{escape(name)}</th>" for name in head])
    body = "".join([f"<tr>{''.join([_cell(cell) for cell in row])}</tr>" for row in rows])
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    return f'<td style="text-align:left">{escape(_still(text))}</td>'


def _still(text: str) -> str:
    """A text without characters that act."""
    return ACTING.sub(" ", text)
