"""The second run is a second run: blocks run where the place says, and few tests stay out of it."""

from __future__ import annotations

import importlib
from collections import Counter

import pytest
import torch

import weft
from tests.language import places
from tests.language.places import LOCAL_ONLY
from weft.errors import UnknownOptionError


def test_blocks_run_in_their_place(place, model, ids):
    with model.trace(ids) as tracer:
        model.lm_head.output.save()
    with weft.Model(torch.nn.Linear(2, 2)).trace(torch.ones(1, 2)) as plain:
        plain.result.save()
    for one in (tracer, plain):
        assert (one.where == "here") is (str(place) == "here")
        assert (one.traffic.up > 0 and one.traffic.down > 0) is (str(place) == "server")


def test_tests_that_stay_here_are_these():
    """Whoever keeps another one from the server says so twice, and why."""
    for name in LOCAL_ONLY:
        module, _, test = name.partition("::")
        found = importlib.import_module(f"tests.language.{module}")
        assert not test or callable(getattr(found, test)), name
    assert Counter(LOCAL_ONLY.values()) == {
        places._EAGER: 4,
        places._ALIKE: 1,
        places._WEIGHTS: 5,
        places._HERE: 2,
        places._KEPT: 1,
        places._ARGUMENT: 1,
        places._ADDRESS: 1,
        places._METHOD: 1,
        places._GRAPH: 1,
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eager": True}, "eager=True"),
        ({"grad": True}, "grad=True"),
        ({"fn": "forward_again"}, "fn='forward_again'"),
    ],
    ids=["eager", "grad", "fn"],
)
def test_what_stays_here_is_refused_there(place, gpt2, ids, options, said, monkeypatch):
    """In a session too: a test that stays here for such a reason would not run there."""
    model = gpt2.model
    monkeypatch.setattr(type(gpt2.net), "forward_again", type(gpt2.net).forward, raising=False)
    if str(place) == "here":
        with model.trace(ids, **options):
            model.lm_head.output.save()
        return
    with (
        pytest.raises(UnknownOptionError, match=said),
        model.session(),
        model.trace(ids, **options),
    ):
        model.lm_head.output.save()
