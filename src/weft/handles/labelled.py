"""`Labelled`: a tensor whose dimensions have names and coordinates, as a sweep brings it.

    effect = model.sweep(prompt, patch, layer=range(12), position=range(9))
    effect.values                    # the plain tensor, [12, 9, ...]
    effect.sel(layer=3).values       # [9, ...]
    effect.to_pandas()               # layers by positions

It is for looking things up and showing them, no second tensor library: arithmetic is done on
`.values`.
"""

from __future__ import annotations

import html
import importlib
from collections.abc import Mapping
from typing import Any

import torch

from weft.errors import InputError

LARGEST = 60
"""Rows and columns that a notebook shows."""


class Labelled:
    """`values`, the names of its dimensions in order, and the coordinates of those that have some.

    dims: one name for each dimension. coords: by name of a dimension, a label for each place of it.
    """

    def __init__(
        self,
        values: torch.Tensor,
        dims: tuple[str, ...],
        coords: Mapping[str, tuple[Any, ...]],
        name: str = "value",
    ) -> None:
        if len(dims) != values.dim() or len(set(dims)) != len(dims):
            raise InputError(
                f"{values.dim()} dimensions need as many names, not {list(dims)}",
                fix="give each dimension a name of its own",
            )
        for dim, labels in coords.items():
            if dim not in dims or len(labels) != values.shape[dims.index(dim)]:
                raise InputError(
                    f"the coordinates {dim!r} do not fit {_sizes(values, dims)}",
                    fix="give one label for each place of a dimension",
                )
        self.values = values
        self.dims = dims
        self.coords = {dim: tuple(coords[dim]) for dim in dims if dim in coords}
        self.name = name

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def item(self) -> Any:
        """The number, where there is only one."""
        return self.values.item()

    def sel(self, **labels: Any) -> Labelled:
        """The part at these coordinates: `sel(layer=3)` without that dimension, `sel(layer=[3, 4])`
        with it. Raises `InputError` for a name or a coordinate that is not there."""
        values, dims, coords = self.values, self.dims, dict(self.coords)
        for dim, label in labels.items():
            if dim not in self.coords:
                raise InputError(
                    f"there are no coordinates {dim!r}", fix=f"there are {', '.join(self.coords)}"
                )
            several = isinstance(label, (list, range))
            wanted = list(label) if several else [label]
            places = [_place(dim, one, self.coords[dim]) for one in wanted]
            axis = dims.index(dim)
            values = values.index_select(axis, torch.tensor(places, device=values.device))
            if several:
                coords[dim] = tuple(wanted)
            else:
                values, dims = values.squeeze(axis), (*dims[:axis], *dims[axis + 1 :])
                del coords[dim]
        return Labelled(values, dims, coords, self.name)

    def relabelled(self, **labels: Any) -> Labelled:
        """The same with other coordinates: `relabelled(position=tokens)`."""
        coords = {dim: tuple(given) for dim, given in labels.items()}
        return Labelled(self.values, self.dims, self.coords | coords, self.name)

    # -- tables and pictures -----------------------------------------------------------------------

    def to_pandas(self) -> Any:
        """A Series for one dimension, a DataFrame for two (the first down), for more a Series by
        all coordinates. Dimensions of size 1 without coordinates are left out."""
        pandas: Any = _needed("pandas")
        flat = self._flat()
        numbers = _plain(flat.values)
        labels = [flat._labels(dim) for dim in flat.dims]
        if len(flat.dims) == 2:
            rows, columns = [
                pandas.Index(one, name=dim) for one, dim in zip(labels, flat.dims, strict=True)
            ]
            return pandas.DataFrame(numbers, index=rows, columns=columns)
        if len(flat.dims) == 1:
            index = pandas.Index(labels[0], name=flat.dims[0])
        elif flat.dims:
            index = pandas.MultiIndex.from_product(labels, names=flat.dims)
        else:
            index = None
        return pandas.Series(numbers.reshape(-1), index=index, name=self.name)

    def plot(self, **layout: Any) -> Any:
        """A plotly figure: a heat map of two dimensions (the first down), a line of one.

        layout: what `Figure.update_layout` takes. Raises `InputError` for more dimensions.
        """
        graphs: Any = _needed("plotly.graph_objects", "plotly")
        flat = self._flat()
        if not 1 <= len(flat.dims) <= 2:
            raise InputError(
                f"a picture has one or two dimensions, not {list(flat.dims)}",
                fix="pick some: .sel(...)",
            )
        labels = [[_label(one) for one in flat._labels(dim)] for dim in flat.dims]
        numbers = _plain(flat.values)
        if len(flat.dims) == 1:
            trace, names = graphs.Scatter(x=labels[0], y=numbers), (flat.dims[0], self.name)
        else:
            trace = graphs.Heatmap(z=numbers, x=labels[1], y=labels[0], colorscale="RdBu", zmid=0)
            names = flat.dims[1], flat.dims[0]
        figure = graphs.Figure(data=[trace])
        figure.update_layout(
            **{"title": self.name, "xaxis_title": names[0], "yaxis_title": names[1], **layout}
        )
        return figure

    def _flat(self) -> Labelled:
        """Without dimensions of size 1 that have no coordinates."""
        values, dims = self.values, list(self.dims)
        for dim in self.dims:
            axis = dims.index(dim)
            if dim not in self.coords and values.shape[axis] == 1:
                values = values.squeeze(axis)
                dims.remove(dim)
        return Labelled(values, tuple(dims), self.coords, self.name)

    def _labels(self, dim: str) -> list[Any]:
        found = self.coords.get(dim)
        return list(range(self.shape[self.dims.index(dim)]) if found is None else found)

    def __repr__(self) -> str:
        lines = [f"<{self.name}: {_sizes(self.values, self.dims)}>"]
        lines += [f"  {dim}: {_short(labels)}" for dim, labels in self.coords.items()]
        return "\n".join([*lines, repr(self.values)])

    def _repr_html_(self) -> str:
        flat = self._flat()
        head = f"<p><b>{_text(self.name)}</b> {_text(_sizes(self.values, self.dims))}</p>"
        if not 1 <= len(flat.dims) <= 2 or max(flat.shape) > LARGEST:
            return f"{head}<pre>{_text(repr(self))}</pre>"
        numbers = _plain(flat.values)
        if len(flat.dims) == 1:
            numbers = numbers[None]
            rows, columns, corner = [""], flat._labels(flat.dims[0]), flat.dims[0]
        else:
            rows, columns = [flat._labels(dim) for dim in flat.dims]
            corner = f"{flat.dims[0]} \\ {flat.dims[1]}"
        cells = "".join([f"<th>{_text(one)}</th>" for one in columns])
        body = [
            f"<tr><th>{_text(row)}</th>{''.join([_cell(one) for one in line])}</tr>"
            for row, line in zip(rows, numbers.tolist(), strict=True)
        ]
        return f"{head}<table><tr><th>{_text(corner)}</th>{cells}</tr>{''.join(body)}</table>"


def _place(dim: str, label: Any, labels: tuple[Any, ...]) -> int:
    try:
        return labels.index(label)
    except ValueError:
        raise InputError(
            f"{dim}={label!r} is not in the sweep", fix=f"there are {_short(labels)}"
        ) from None


def _plain(values: torch.Tensor) -> Any:
    """As numpy has it, which knows no bfloat16."""
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def _needed(module: str, package: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = package or module
        if (error.name or "").split(".")[0] != name:
            raise
        raise ModuleNotFoundError(
            f'tables and pictures of a sweep need {name}: pip install "weft[viz]"', name=name
        ) from None


def _sizes(values: torch.Tensor, dims: tuple[str, ...]) -> str:
    sizes = [f"{dim} {size}" for dim, size in zip(dims, values.shape, strict=True)]
    return f"{str(values.dtype).removeprefix('torch.')}[{', '.join(sizes)}]"


def _short(labels: tuple[Any, ...]) -> str:
    shown = [repr(one) for one in labels[:8]]
    return ", ".join(shown if len(labels) <= 8 else [*shown, f"... ({len(labels)})"])


def _label(label: Any) -> str:
    return label if isinstance(label, str) else repr(label)


def _text(text: Any) -> str:
    return html.escape(text if isinstance(text, str) else repr(text))


def _cell(number: Any) -> str:
    return f"<td>{number:.4g}</td>" if isinstance(number, float) else f"<td>{_text(number)}</td>"
