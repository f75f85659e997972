"""Refusals about edits of the model, as `refusals`."""

from __future__ import annotations

import torch
from msgspec import structs

from tests.language.refusals import A, B, refused
from weft import errors as e
from weft.handles.experiment import Experiment
from weft.trace.edits import check_edit


@refused(e.EditError, "nothing can be saved in it", fix="save in a trace of the edited model")
def save_in_an_edit(on):
    with on.model.edit():
        on.h[1].output.save()  # here


@refused(e.EditError, "no number can be looked at in it", fix="torch.where")
def look_in_an_edit(on):
    with on.model.edit():
        if on.h[1].output.norm() > 3:  # here
            raise AssertionError


@refused(e.EditError, "a gradient cannot be part of an edit", fix="in a trace of the edited model")
def gradient_in_an_edit(on):
    with on.model.edit():
        on.model.lm_head.output.sum().backward()  # here


@refused(e.EditError, "writes into a tensor of yours", fix="torch.zeros_like(h)")
def edit_that_writes_into_a_tensor(on):
    mine = torch.zeros(3)
    with on.model.edit():
        mine[0] = on.h[1].output[0, 0, 0]  # here


@refused(e.EditError, "writes into a tensor of yours", fix="torch.zeros_like(h)")
def graph_that_writes_into_a_tensor(on):
    mine = torch.zeros(3)
    with on.trace() as tracer:
        mine[0] = on.h[1].output[0, 0, 0]  # here
        on.h[1].output[0, 0, :3] = mine
    check_edit(tracer.graph.graph)


@refused(e.EditError, "about every input and step", fix="in a block of the edited model")
def edit_of_one_invoke(on):
    with on.model.trace() as tracer:
        with tracer.invoke(B):
            pass
        with tracer.invoke(A):
            on.h[1].output[:] = 0  # here
            on.h[2].output.save()
    check_edit(tracer.graph.graph)


@refused(
    e.EditError, "does not fit this input: ", "out of bounds", fix="trace the model without it"
)
def edit_beyond_the_prompt(on):
    with on.model.edit() as edited:
        on.h[1].output[:, 7] = 0  # here
    with edited.trace(B):
        raise AssertionError


@refused(e.EditError, "transformer.h.1.mlp.source", "is another one here", fix="anew")
def edit_of_another_source(on):
    with on.model.edit() as edited:
        on.h[1].mlp.source.self_act_0.output[:] = 0  # here
    (edit,) = edited._edits
    (mark,) = edit.graph.sources
    changed = structs.replace(mark, digest="0" * len(mark.digest))
    other = structs.replace(edit.graph, sources=(changed,))
    edited.__dict__["_edits"] = (Experiment(other, edit.constants),)
    with edited.trace(B):
        raise AssertionError
