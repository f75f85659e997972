"""What cannot be an edit, or does not fit an input, is refused with the edit's own line."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import weft
from weft.errors import (
    EditError,
    InputError,
    NotReachedError,
    RecordingError,
    UnknownOptionError,
    UnsupportedOperationError,
)


def here(text: str) -> str:
    """The place of the caller's line that holds `text`."""
    frame = inspect.stack()[1]
    lines = inspect.getsource(frame.frame).splitlines()
    first = frame.frame.f_code.co_firstlineno
    (found,) = [first + n for n, line in enumerate(lines) if text in line and "here(" not in line]
    return f"{__file__}:{found}:"


def refused(model, make, *inputs):
    """The error of an edit that cannot be made; the handle is as it was."""
    with pytest.raises(EditError) as caught, model.edit(*inputs, inplace=True):
        make()
    assert not model._edits
    return caught.value


def test_what_brings_something_back_or_looks_or_ends(model):
    def save():
        model.transformer.h[1].output.save()

    def saves():
        weft.save([model.transformer.h[1].output])

    def look():
        if model.transformer.h[1].output.norm() > 3:
            raise AssertionError

    def chosen():
        h = model.transformer.h[1].output
        h[h > 0][:] = 1

    def loss():
        model.lm_head.output.sum().backward()

    def grad():
        model.transformer.h[1].output.grad[:] = 0

    def dirty():
        mine = torch.zeros(3)
        mine[0] = model.transformer.h[1].output[0, 0, 0]

    for make, text, says in (
        (save, ".output.save()", "nothing can be saved in it"),
        (saves, "weft.save(", "nothing can be saved in it"),
        (look, "norm() > 3", "no number can be looked at"),
        (chosen, "h[h > 0]", "no number can be looked at"),
        (loss, ".backward()", "a gradient cannot be part of an edit"),
        (grad, ".grad[:]", "a gradient cannot be part of an edit"),
        (dirty, "mine[0] =", "a tensor of yours"),
    ):
        error = refused(model, make)
        assert says in error.message
        assert text in str(error.line)
        assert f"{__file__}:" in str(error.line)


def test_a_size_of_batch_or_length_that_was_read_as_a_number(model):
    def make():
        h = model.transformer.h[1].output
        h[:, : h.shape[1] // 2] = 0

    error = refused(model, make)
    assert "read dimension 1 as the number" in error.message
    assert "h.shape[1] // 2" in str(error.line)
    assert "model.edit(prompt)" in str(error.fix)


def test_a_width_may_be_read_as_a_number(model, ids):
    with model.edit() as edited:
        h = model.transformer.h[1].output
        h[..., : h.shape[-1] // 2] = 0
    with edited.trace(ids):
        h = model.transformer.h[1].output.save()
    assert h[..., :16].abs().max() == 0
    assert h[..., 16:].abs().max() > 0


def test_a_tensor_of_one_size(model, ids):
    """Without an example it fits no input but one; with it, that one."""

    def make():
        model.transformer.h[1].output = torch.zeros(8, 63, 32)  # the sizes that stand for any

    error = refused(model, make)
    assert "torch.zeros(8, 63, 32)" in str(error.line)
    with model.edit(ids) as edited:
        model.transformer.h[1].output = torch.zeros(1, 9, 32)
    line = here("torch.zeros(1, 9, 32)")
    with (
        pytest.raises(EditError, match="does not fit this input") as caught,
        edited.trace(ids[:, :4]),
    ):
        pass
    assert str(caught.value.line).startswith(line)
    with model.trace(ids):  # the failed block has left nothing open
        pass


def test_an_index_beyond_the_prompt(model, ids):
    with model.edit() as edited:
        model.transformer.h[1].output[:, 7] = 0
    line = here("[:, 7] = 0")
    with edited.trace(ids):
        model.lm_head.output.save()
    with pytest.raises(EditError, match="out of bounds") as caught, edited.trace(ids[:, :7]):
        raise AssertionError("the block is not entered")
    assert str(caught.value.line).startswith(line)
    with pytest.raises(EditError, match="out of bounds"), edited.trace() as tracer:
        with tracer.invoke(ids):
            pass
        with tracer.invoke(ids[:, :3]):
            raise AssertionError("the invoke is not entered")


def test_sizes_that_an_example_bound(model, ids):
    with model.edit(ids) as edited:
        h = model.transformer.h[1].output
        h[:, : h.shape[1] // 2] = 0
    with edited.trace(ids):
        model.lm_head.output.save()
    with (
        pytest.raises(EditError, match="dimension 1 as the number 9") as caught,
        edited.trace(ids[:, :4]),
    ):
        pass
    assert "h.shape[1] // 2" in str(caught.value.line)
    with edited.trace(ids) as tracer:  # what it read binds the graph of each block, too
        model.lm_head.output.save()
    assert "was read as 9" in str(tracer.graph)


def test_memory_that_is_shared_otherwise(ids):
    """`reshape` makes a copy of some sizes and a view of others: then an edit would be lost."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model = weft.Model(net)
    with model.edit(torch.zeros(1, 5, 4)) as edited:
        model[0].output.transpose(0, 1).reshape(5, 6)[0] = 0
    x = torch.randn(1, 5, 4)
    with edited.trace(x):
        h = model[0].output.save()
    assert h[0, 0].abs().max() == 0
    with model.edit(torch.zeros(1, 5, 4)) as edited:
        model[0].output.transpose(0, 1).reshape(-1, 6)[0] = 0
    with pytest.raises(EditError, match="a view where the edit was made, and gives a copy"):
        edited.trace(torch.randn(2, 5, 4)).__enter__()


def test_edits_that_do_not_go_together(model):
    with model.edit() as edited:
        model.transformer.h[1].skip(model.transformer.h[1].input)
    with pytest.raises(EditError, match="does not fire") as caught, edited.edit():
        model.transformer.h[1].mlp.output[:] = 0
    assert "mlp.output[:] = 0" in str(caught.value.line)


def test_a_trace_that_names_what_an_edit_skips(model, ids):
    with model.edit() as edited:
        model.transformer.h[1].skip(model.transformer.h[1].input)
    line = here("model.transformer.h[1].skip(")
    with pytest.raises(NotReachedError, match="is skipped") as caught, edited.trace(ids):
        model.transformer.h[1].mlp.output.save()
    assert line in caught.value.message


def test_a_late_edit_and_a_wrong_shape_are_refused_where_they_stand(model):
    with pytest.raises(RecordingError, match="exists only later"), model.edit():
        model.transformer.h[0].output[:] = model.transformer.h[2].output
    with pytest.raises(RuntimeError), model.edit():
        model.transformer.h[0].output[:] = torch.zeros(31)
    with pytest.raises(UnsupportedOperationError), model.edit():
        model.transformer.h[0].output.data_ptr()


def test_what_follows_no_parameter(model):
    a, b = torch.randn(32, 2, requires_grad=True), torch.randn(2, 32, requires_grad=True)

    def make():
        h = model.transformer.h[1].output
        model.transformer.h[1].output = h @ (a @ b)

    error = refused(model, make)
    assert "h @ (a @ b)" in str(error.line)
    with model.edit():
        h = model.transformer.h[1].output
        model.transformer.h[1].output = (h @ a) @ b


def test_options(model, ids):
    with pytest.raises(UnknownOptionError, match="seed is an option of traces"):
        model.edit(seed=1)
    with pytest.raises(UnknownOptionError, match="inplace is True or False"):
        model.edit(inplace=1)
    with pytest.raises(UnknownOptionError, match="no_such"):
        model.edit(no_such=1)
    with pytest.raises(InputError, match="needs an input"):
        weft.Model(nn.Linear(2, 2)).edit()


def test_values_of_an_edit_have_no_numbers(model):
    with model.edit():
        h = model.transformer.h[1].output
    with pytest.raises(RuntimeError, match="an edit is only recorded"):
        _ = h + 1


def test_blocks_inside_of_an_edit(model, ids):
    with pytest.raises(RecordingError, match="inside another block"), model.edit() as edited:
        edited.trace(ids).__enter__()
    with pytest.raises(RecordingError, match="inside another block"), model.trace(ids):
        model.edit().__enter__()
    edit = model.edit()
    with edit:
        pass
    with pytest.raises(RecordingError, match="second time"), edit:
        pass
