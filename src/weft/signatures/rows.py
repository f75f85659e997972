"""Where a batch's rows and positions lie in a site: told by its formulas, never by its sizes.

    dims_of(formulas, index, leaf)        # (("B",), ("S",), ()) for [batch, pos, d_model]

Of each dimension its factors in order: "B" (the batch), "S" (the length) and a number; none for a
dimension that is everybody's. None where a dimension is no such product.
"""

from __future__ import annotations

from weft.graph.site import Leaf

from .expressions import Formulas, Layout, Number, Sum

Dims = tuple[tuple["str | int", ...], ...]


def dims_of(formulas: Formulas, index: int, leaf: Leaf) -> Dims | None:
    """The dimensions of one tensor of a site; None where they do not say where rows lie.

    In a batch of one row, or of one token, that dimension is a number as any other.
    """
    row = formulas.rows[index]
    if row is None or leaf not in row.keys:
        return None
    what = row.what[row.keys.index(leaf)]
    shape = what.shape if isinstance(what, Layout) else getattr(what, "shape", None)
    if shape is None:
        return None
    dims = [_dim(number) for number in shape]
    return None if None in dims else tuple(dims)  # type: ignore[arg-type]


def _dim(number: Number) -> tuple[str | int, ...] | None:
    if not isinstance(number, Sum):
        return ()
    if len(number.terms) != 1 or number.divisor != 1:
        return None
    ((c, i, j),) = number.terms
    if i > 1 or j > 1 or c < 1:
        return None
    return (*("B",) * i, *("S",) * j, *((c,) if c > 1 else ()))
