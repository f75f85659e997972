"""The second run is a second run: blocks run where the place says, and few tests stay out of it."""

from __future__ import annotations

import importlib

import torch

import weft
from tests.language.places import LOCAL_ONLY


def test_blocks_run_in_their_place(place, model, ids):
    with model.trace(ids) as tracer:
        model.lm_head.output.save()
    with weft.Model(torch.nn.Linear(2, 2)).trace(torch.ones(1, 2)) as plain:
        plain.result.save()
    for one in (tracer, plain):
        assert (one.where == "here") is (str(place) == "here")
        assert (one.traffic.up > 0 and one.traffic.down > 0) is (str(place) == "server")


def test_tests_that_stay_here_exist_and_are_few():
    for name in LOCAL_ONLY:
        module, _, test = name.partition("::")
        assert callable(getattr(importlib.import_module(f"tests.language.{module}"), test)), name
    assert len(LOCAL_ONLY) < 15
