"""`Labelled`: parts by their coordinates, tables and pictures."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weft.errors import InputError
from weft.handles.labelled import Labelled

VALUES = torch.arange(24.0).reshape(2, 3, 1, 4)


def labelled(values=VALUES, **coords) -> Any:
    coords = coords or {"layer": (5, 7), "head": ("a", "b", (1, 2))}
    rest = [f"dim_{n}" for n in range(values.dim() - len(coords))]
    return Labelled(values, (*coords, *rest), {k: tuple(v) for k, v in coords.items()}, "effect")


def test_a_part_is_found_by_its_coordinates():
    found = labelled().sel(layer=7, head="b")
    assert torch.equal(found.values, VALUES[1, 1]) and found.dims == ("dim_0", "dim_1")
    found = labelled().sel(head=[(1, 2), "a"])
    assert torch.equal(found.values, VALUES[:, [2, 0]])
    assert found.coords == {"layer": (5, 7), "head": ((1, 2), "a")}
    assert torch.equal(labelled().sel(layer=range(5, 6)).values, VALUES[:1])
    assert labelled(torch.ones(1), n=[3]).sel(n=3).item() == 1


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ({"layer": 6}, "layer=6 is not in the sweep\n  fix: there are 5, 7"),
        ({"layr": 5}, "no coordinates 'layr'\n  fix: there are layer, head"),
        ({"dim_0": 0}, "no coordinates 'dim_0'"),
    ],
)
def test_what_is_not_there_is_said(labels, text):
    with pytest.raises(InputError) as caught:
        labelled().sel(**labels)
    assert text in str(caught.value)


def test_labels_fit_the_tensor():
    with pytest.raises(InputError, match="as many names"):
        Labelled(VALUES, ("a",), {})
    with pytest.raises(InputError, match="do not fit"):
        labelled(layer=[1], head=[1, 2, 3])
    again = labelled().relabelled(head=["x", "y", "z"])
    assert again.sel(head="y").values.equal(VALUES[:, 1]) and again.coords["layer"] == (5, 7)
    with pytest.raises(InputError, match="do not fit"):
        labelled().relabelled(head=["x"])


def test_it_says_what_it_is():
    text = repr(labelled())
    assert "<effect: float32[layer 2, head 3, dim_0 1, dim_1 4]>" in text
    assert "head: 'a', 'b', (1, 2)" in text


def test_a_page_gets_a_table_and_no_markup_of_others():
    shown = labelled(torch.tensor([[1.0, 2.5], [3.0, 4.0]]), layer=[0, 1], token=["<b>", "&"])
    page = shown._repr_html_()
    assert "<td>2.5</td>" in page and "<th>&lt;b&gt;</th><th>&amp;</th>" in page
    assert "<b>&" not in page
    assert "layer \\ token" in page
    assert "<td>3</td>" in labelled(torch.tensor([1, 3]), n=[4, 5])._repr_html_()
    assert "<pre>" in labelled()._repr_html_()  # three dimensions have no table


# -- pandas and plotly, which need not be there --------------------------------------------------


class Pandas(SimpleNamespace):
    """What of pandas is used, as plain records."""

    def __init__(self) -> None:
        multi = SimpleNamespace(from_product=lambda labels, names: ("multi", labels, [*names]))
        super().__init__(
            Index=lambda labels, name: (name, labels),
            MultiIndex=multi,
            Series=lambda numbers, index, name: SimpleNamespace(
                numbers=numbers, index=index, name=name
            ),
            DataFrame=lambda numbers, index, columns: SimpleNamespace(
                numbers=numbers, index=index, columns=columns
            ),
        )


def test_tables(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", Pandas())
    frame = labelled(torch.ones(2, 3, 1, dtype=torch.bfloat16)).to_pandas()
    assert frame.numbers.tolist() == [[1, 1, 1]] * 2
    assert frame.index == ("layer", [5, 7]) and frame.columns == ("head", ["a", "b", (1, 2)])
    series = labelled(torch.tensor([1, 2]), layer=[5, 7]).to_pandas()
    assert series.numbers.tolist() == [1, 2] and series.index == ("layer", [5, 7])
    series = labelled().to_pandas()
    assert series.index == (
        "multi",
        [[5, 7], ["a", "b", (1, 2)], [0, 1, 2, 3]],
        ["layer", "head", "dim_1"],
    )
    assert series.numbers.tolist() == VALUES.reshape(-1).tolist()


class Figure:
    def __init__(self, data):
        self.data = data

    def update_layout(self, **layout):
        self.layout = layout


def test_pictures(monkeypatch):
    graphs = SimpleNamespace(
        Figure=Figure,
        Heatmap=lambda **given: SimpleNamespace(**given),
        Scatter=lambda **given: SimpleNamespace(**given),
    )
    monkeypatch.setitem(sys.modules, "plotly", SimpleNamespace(graph_objects=graphs))
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", graphs)
    figure = labelled(torch.ones(2, 3, 1)).plot(title="mine")
    (trace,) = figure.data
    assert trace.z.shape == (2, 3) and trace.y == ["5", "7"] and trace.x == ["a", "b", "(1, 2)"]
    assert figure.layout == {"title": "mine", "xaxis_title": "head", "yaxis_title": "layer"}
    (trace,) = labelled(torch.ones(2), layer=[5, 7]).plot().data
    assert trace.x == ["5", "7"] and trace.y.tolist() == [1, 1]
    with pytest.raises(InputError, match="one or two dimensions"):
        labelled().plot()


@pytest.mark.parametrize(
    ("name", "use"),
    [("pandas", lambda one: one.to_pandas()), ("plotly", lambda one: one.plot())],
)
def test_where_they_are_not_there_it_is_said_how_to_get_them(monkeypatch, name, use):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{name}.graph_objects", None)
    with pytest.raises(ModuleNotFoundError, match=rf"need {name}: pip install .weft\[viz\]"):
        use(labelled(torch.ones(2, 3)))
