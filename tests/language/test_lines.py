"""Errors and graphs name the user's own line, wherever the code stands."""

from __future__ import annotations

import functools
import linecache
import sys

import einops
import pytest
import torch

from weft.errors import NotSavedError, UnsupportedOperationError


def here() -> int:
    return sys._getframe(1).f_lineno


def line_of(caught) -> tuple[str, int]:
    """`file:3: text` as (file, 3)."""
    place, _, _ = str(caught.value.line).partition(": ")
    file, _, number = place.rpartition(":")
    return file, int(number)


def helper(h):
    return h.data_ptr()  # in the helper


def test_a_line_in_a_helper_function(model, ids):
    with pytest.raises(UnsupportedOperationError) as caught, model.trace(ids):
        helper(model.transformer.h[1].output)
    assert line_of(caught)[0] == __file__
    assert "# in the helper" in str(caught.value.line)


def test_a_line_in_a_comprehension(model, ids):
    with pytest.raises(UnsupportedOperationError) as caught, model.trace(ids):
        expected = here() + 1
        [layer.output.data_ptr() for layer in model.transformer.h]
    assert line_of(caught) == (__file__, expected)


def test_a_line_in_a_lambda(model, ids):
    use = lambda h: h.data_ptr()  # in the lambda
    with pytest.raises(UnsupportedOperationError) as caught, model.trace(ids):
        use(model.transformer.h[1].output)
    assert "# in the lambda" in str(caught.value.line)


def test_a_line_in_a_generator(model, ids):
    with pytest.raises(UnsupportedOperationError) as caught, model.trace(ids):
        expected = here() + 1
        list(layer.output.data_ptr() for layer in model.transformer.h)  # noqa: C400
    assert line_of(caught) == (__file__, expected)


def test_a_line_of_a_statement_over_several_lines(model, ids):
    with pytest.raises(UnsupportedOperationError) as caught, model.trace(ids):
        first = here() + 1
        torch.stack(
            [
                model.transformer.h[0].output,
                model.transformer.h[1].output,
            ]
        ).sum().data_ptr()
    assert first <= line_of(caught)[1] < first + 6
    assert line_of(caught)[0] == __file__


def test_a_line_behind_a_partial_and_a_library(model, ids):
    use = functools.partial(einops.rearrange, pattern="b s (n d) -> b s n d", n=4)
    with model.trace(ids) as tracer:
        expected = here() + 1
        use(model.transformer.h[1].output).save()
    lines = [line for line in str(tracer.graph).splitlines() if not line.startswith("bound")]
    assert len(lines) > 2
    assert all(line.endswith(f"# test_lines.py:{expected}") for line in lines)


def test_a_line_behind_pytorchs_own_python(model, ids):
    layer = torch.nn.Sequential(torch.nn.Linear(32, 4), torch.nn.Softmax(-1))
    with model.trace(ids) as tracer:
        expected = here() + 1
        torch.einsum("bsd,bsd->bs", *[layer(model.transformer.h[1].output)] * 2).save()
    lines = str(tracer.graph).splitlines()
    assert len(lines) > 4
    assert all(line.endswith(f"# test_lines.py:{expected}") for line in lines)


class Probe(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(32, 2)

    def forward(self, h):
        return self.inner(h).data_ptr()  # in the user's module


def test_a_line_in_the_users_own_module(model, ids):
    with pytest.raises(UnsupportedOperationError) as caught, model.trace(ids):
        Probe()(model.transformer.h[1].output)
    assert "# in the user's module" in str(caught.value.line)


SOURCE = """
with model.trace(ids):
    h = model.transformer.h[1].output
    model.lm_head.output.save()
h + 1
"""


@pytest.mark.parametrize(
    "file", ["<stdin>", "<string>", "<ipython-input-3-abc>", "/tmp/ipykernel_1/2.py"]
)
def test_a_line_of_code_without_a_file(model, ids, file):
    with pytest.raises(NotSavedError) as caught:
        exec(compile(SOURCE, file, "exec"), {"model": model, "ids": ids})
    assert line_of(caught) == (file, 3)


def test_the_text_of_a_notebook_cell_is_shown(model, ids):
    """IPython puts its cells into `linecache`."""
    file = "<cell 1>"
    linecache.cache[file] = (len(SOURCE), None, SOURCE.splitlines(True), file)
    try:
        with pytest.raises(NotSavedError) as caught:
            exec(compile(SOURCE, file, "exec"), {"model": model, "ids": ids})
    finally:
        del linecache.cache[file]
    assert str(caught.value.line) == "<cell 1>:3: h = model.transformer.h[1].output"


def test_exec_in_exec(model, ids):
    inner = compile("h.data_ptr()", "<inner>", "exec")
    with pytest.raises(UnsupportedOperationError) as caught, model.trace(ids):
        exec("exec(inner, {'h': h})", {"h": model.transformer.h[1].output, "inner": inner})
    assert line_of(caught) == ("<inner>", 1)


def test_an_error_of_a_run_names_the_line_of_the_operation(model, ids):
    """An index that is out of range is known only when the numbers are."""
    with pytest.raises((IndexError, RuntimeError)) as caught, model.trace(ids):
        index = model.transformer.wte.input.max() + 1000
        expected = here() + 1
        model.transformer.h[1].output[:, index].save()
    notes = "".join(getattr(caught.value, "__notes__", [])) + str(caught.value)
    assert f"{__file__}:{expected}" in notes
