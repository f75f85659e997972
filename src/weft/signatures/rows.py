"""Where a batch's rows and positions lie in a site: told by its formulas, never by its sizes.

    dims_of(formulas, index, leaf)        # ("B", "S", 0) for [batch, pos, d_model]

Each dimension is "B" (the batch), "S" (the length), or 0 (neither: all of it is everybody's). None
where a dimension is anything else, such as `B*S` rows of experts.
"""

from __future__ import annotations

from weft.graph.site import Leaf

from .expressions import Formulas, Layout, Number, Sum

Dims = tuple["str | int", ...]


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


def _dim(number: Number) -> str | int | None:
    return _NAMES.get(number) if isinstance(number, Sum) else 0


_NAMES = {Sum(((1, 1, 0),)): "B", Sum(((1, 0, 1),)): "S"}
