"""Rows that grow: the schedule on numbers, against what it has to mean; and the rows of a pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.graph.site import Site
from weft.run.trunk import Growth, Need, Rows, Station, schedule

STATIONS = [Station((f"h.{n}", port, 0), 10 * n + (0 if port == "inputs" else 8), ((),))
            for n in range(3) for port in ("inputs", "output")]  # fmt: skip
"""At 0, 8, 10, 18, 20 and 28 of a pass of 40 sites."""


def sizes(growth: Growth) -> list[int]:
    return [segment.size for segment in growth.segments]


def test_points_of_one_prompt_fork_where_they_are_edited():
    needs = {n: Need(1, 0, edited, 35) for n, edited in enumerate((9, 9, 19, 28))}
    growth = schedule(needs, STATIONS)
    assert sizes(growth) == [1, 1, 3, 3, 4, 4, 4]
    assert growth.moves == {1: (0, 0, 0), 3: (0, 1, 2, 0)}
    assert growth.peak == 4
    assert growth.segments[0].places == dict.fromkeys(range(4), (0, 1))
    assert growth.segments[2].places == {3: (0, 1), 2: (0, 1), 0: (1, 2), 1: (2, 3)}
    assert growth.segments[-1].sources == (0, 0, 0, 0)


def test_the_one_that_is_never_edited_is_the_trunk():
    needs = {0: Need(1, 0, 28, 35), 1: Need(1, 0, None, 12), 2: Need(1, 0, None, 35)}
    growth = schedule(needs, STATIONS)
    assert sizes(growth) == [1, 1, 1, 1, 1, 1, 2]
    assert growth.segments[-1].places[0] != growth.segments[-1].places[2]


def test_who_is_edited_before_the_first_station_has_rows_from_the_begin():
    stations = STATIONS[2:]
    needs = {0: Need(2, 0, 3, 35), 1: Need(2, 0, 12, 35), 2: Need(2, 0, 3, 35)}
    growth = schedule(needs, stations)
    assert sizes(growth)[0] == 6 and growth.moves == {}


def test_rows_that_nobody_needs_any_more_are_left_out():
    needs = {0: Need(1, 0, 1, 9), 1: Need(1, 0, 1, 35), 2: Need(1, 1, None, 3)}
    growth = schedule(needs, STATIONS)
    assert sizes(growth) == [2, 3, 2, 1, 1, 1, 1]
    assert schedule({0: Need(1, 0, 1, 9)}, STATIONS).segments[-1].owners == (0,)


@st.composite
def many(draw: Any) -> dict[int, Need]:
    count = draw(st.integers(1, 7))
    rows = {group: draw(st.integers(1, 3)) for group in range(3)}
    found = {}
    for one in range(count):
        group = draw(st.integers(0, 2))
        last = draw(st.integers(0, 39))
        edited = draw(st.none() | st.integers(0, last))
        found[one] = Need(rows[group], group, edited, last)
    return found


@settings(deadline=None, derandomize=True)
@given(many())
def test_each_sees_its_own_numbers_until_its_last_site(needs):
    """A pass of sites, each of which adds to every row; an edit adds its invoke's own number.

    The oracle runs each invoke by itself.
    """
    growth = schedule(needs, STATIONS)
    by_index = {station.index: station for station in STATIONS}
    rows = Rows(growth)
    owners = growth.segments[0].owners
    begin = [
        torch.arange(needs[one].rows, dtype=torch.float64) + 100 * (1 + needs[one].group)
        for one in owners
    ]
    state = torch.cat(begin)
    for index in range(40):
        station = by_index.get(index)
        if station is not None:
            state = rows.become(Site(*station.key), state)
        for one, need in needs.items():
            if index > need.last:
                continue
            start, stop = growth.segment(index).places[one]
            if index == need.edited:
                state[start:stop] *= 1.5 + one
            alone = torch.arange(need.rows, dtype=torch.float64) + 100 * (1 + need.group)
            for before in range(index + 1):
                if before == need.edited:
                    alone *= 1.5 + one
                if before < index:
                    alone += before
            torch.testing.assert_close(state[start:stop], alone, rtol=1e-12, atol=0)
        state = state + index
        if all(index >= need.last for need in needs.values()):
            break
    plain = sum(need.rows for need in needs.values())
    assert growth.peak <= plain


# -- the rows of a pass --------------------------------------------------------------------------


def test_what_a_layer_is_given_beside_has_the_rows_too():
    """A mask with the rows of the begin; the same one for each layer, and edits of it stay."""
    stations = [
        Station((f"h.{n}", "inputs", 0), 10 * n, ((0, 0),), ((1, "mask"), (1, "bias")))
        for n in range(3)
    ]
    needs = {0: Need(1, 0, 12, 35), 1: Need(1, 1, None, 35), 2: Need(1, 0, 22, 35)}
    growth = schedule(needs, stations)
    rows = Rows(growth)
    assert [site.path for site in rows.sites()] == ["h.1", "h.2"]
    assert growth.segments[0].owners == (1, 2) and growth.segments[2].owners == (1, 2, 0)
    hidden, mask, bias = torch.zeros(2, 3), torch.tensor([[1.0], [2.0]]), torch.arange(4)

    def layer(number: int, hidden: torch.Tensor) -> Any:
        given = (hidden,), {"mask": mask, "bias": bias, "none": None}
        return rows.become(Site(f"h.{number}", "inputs", 0), given)

    args, kwargs = layer(1, hidden)
    assert args[0].shape == (3, 3)
    assert kwargs["mask"].flatten().tolist() == [1, 2, 2]
    assert kwargs["bias"].tolist() == [0, 1, 2, 3, 2, 3] and kwargs["none"] is None
    kwargs["mask"][2] = 9
    args, again = layer(2, args[0])
    assert again["mask"] is kwargs["mask"] and args[0].shape == (3, 3)
    assert mask.flatten().tolist() == [1, 2]


def test_copies_move_on_with_the_rows():
    """Rows that join later come from what the mask was for their trunk, edits included."""
    stations = [
        Station((f"h.{n}", "inputs", 0), 10 * n, ((0, 0),), ((1, "mask"),)) for n in range(3)
    ]
    needs = {0: Need(1, 0, 12, 35), 1: Need(1, 0, 22, 35), 2: Need(1, 0, None, 35)}
    rows = Rows(schedule(needs, stations))
    mask = torch.tensor([[1.0]])
    args, kwargs = rows.become(Site("h.1", "inputs", 0), ((torch.zeros(1, 1),), {"mask": mask}))
    kwargs["mask"][1] = 5  # invoke 0's
    _, kwargs = rows.become(Site("h.2", "inputs", 0), (args, {"mask": mask}))
    assert kwargs["mask"].flatten().tolist() == [1, 5, 1]


@pytest.mark.parametrize("index", range(40))
def test_a_site_lies_after_the_stations_up_to_it(index):
    needs = {n: Need(1, 0, 28, 39) for n in range(2)}
    growth = schedule(needs, STATIONS)
    passed = sum(station.index <= index for station in STATIONS)
    assert growth.segment(index) is growth.segments[passed]
