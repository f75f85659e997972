"""What a run refuses: other shapes, guards, bounds, and how errors reach the user."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from tests.run.graphs import Builder
from tests.run.nets import Chain, Does, example, hook_count, same
from weft.errors import GraphError, GuardError, NotReachedError, SiteMismatchError, WeftError
from weft.run import run
from weft.run.compare import agree


def saved(g, module, *args, **options):
    return run(g.graph(), g.constants, module, args, **options).saved


# Shapes and dtypes


def test_strict_wants_the_recorded_shape():
    g, x = Builder(), example()
    g.save("h", g.read("blocks.0", (2, 4, 8)))
    with pytest.raises(SiteMismatchError) as caught:
        saved(g, Chain(), x)
    text = str(caught.value)
    assert "blocks.0.output should be float32[2, 4, 8], but is float32[2, 3, 8]" in text
    assert caught.value.line == "user.py:100"


def test_not_strict_wants_rank_and_kind_only():
    g, x = Builder(), example()
    g.save("h", g.read("blocks.0", (5, 7, 8), dtype=torch.bfloat16))
    same(saved(g, Chain(), x, strict=False)["h"], Chain().blocks[0](x).detach())
    for like, dtype in (((2, 3), torch.float32), ((2, 3, 8), torch.int64)):
        bad = Builder()
        bad.save("h", bad.read("blocks.0", like, dtype=dtype))
        with pytest.raises(SiteMismatchError):
            saved(bad, Chain(), x, strict=False)


def test_strict_wants_the_recorded_dtype():
    g, x = Builder(), example()
    g.save("h", g.read("blocks.0", (2, 3, 8), dtype=torch.float64))
    with pytest.raises(SiteMismatchError, match="float64"):
        saved(g, Chain(), x)


# Bounds


def test_a_bound_holds_on_another_input():
    g, x = Builder(), example(2, 3)
    h = g.read("blocks.0", x)
    g.bound(h, 1, 3)
    g.save("last", g.item(h, slice(None), 2))
    assert saved(g, Chain(), example(5, 3), strict=False)["last"].shape == (5, 8)
    with pytest.raises(GraphError, match=r"dimension 1 as the number 3.*it is 4") as caught:
        saved(g, Chain(), example(2, 4), strict=False)
    assert caught.value.line == "user.py:100"


def test_a_graph_without_the_bound_is_another_graph():
    g = Builder()
    h = g.read("blocks.0", example(2, 3))
    g.save("last", g.item(h, slice(None), -1))
    saved(g, Chain(), example(2, 4), strict=False)
    g.bound(h, 1, 3)
    with pytest.raises(GraphError, match="dimension 1"):
        saved(g, Chain(), example(2, 4), strict=False)


def test_a_bound_on_a_value_that_nothing_else_needs():
    g, x = Builder(), example(2, 3)
    g.bound(g.read("blocks.0", x), 1, 3)
    g.save("h", g.read("blocks.1", x))
    with pytest.raises(GraphError, match="dimension 1"):
        saved(g, Chain(), example(2, 4), strict=False)


# Guards


def guarded(x, value, expected, look="value"):
    g = Builder()
    g.guard(g.call("sum", g.const(value)) if value is None else g.const(value), expected, look)
    g.save("h", g.read("blocks.0", x))
    return g


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(1.5), 1.5 + 1e-6),
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.49),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.tensor([1000.0, 1e-4]), [1000.0, 2e-4]),  # a part of the largest magnitude
        (torch.tensor(float("nan")), float("nan")),
        (torch.tensor([float("inf"), 1.0]), [float("inf"), 1.0]),
        (torch.tensor(True), True),
        (torch.tensor([]), []),
    ],
)
def test_a_guard_that_holds(value, expected):
    saved(guarded(example(), value, expected), Chain(), example())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(1.5), 1.501),
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.45),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 5]]),
        (torch.tensor([1, 2]), [[1, 2]]),
        (torch.tensor([1, 2]), [1]),
        (torch.tensor(float("nan")), 1.0),
        (torch.tensor(1.0), float("nan")),
        (torch.tensor([float("inf"), 1.0]), [float("-inf"), 1.0]),
        (torch.tensor([1e30, 1.0]), [float("inf"), 1.0]),
        (torch.tensor(True), False),
        (torch.tensor(10**12 + 1), 10**12),
    ],
)
def test_a_guard_that_does_not_hold(value, expected):
    with pytest.raises(GuardError, match="depended on this value") as caught:
        saved(guarded(example(), value, expected), Chain(), example())
    assert caught.value.line == "user.py:101"


def test_a_guard_on_a_shape():
    c = torch.ones(3, 4)
    saved(guarded(example(), c, (3, 4), "shape"), Chain(), example())
    with pytest.raises(GuardError, match=r"\(3, 5\).*\(3, 4\)"):
        saved(guarded(example(), c, (3, 5), "shape"), Chain(), example())


def test_numbers_compare_by_kind():
    assert agree(2, 2, torch.int64) and not agree(2, 3, torch.int64)
    assert agree(1 + 2j, 1 + 2j, torch.complex64)


# Logs


def test_a_log_says_numbers_when_they_exist(capsys):
    g, x = Builder(), example()
    g.log("sum:", g.call("sum", g.const(torch.ones(4))), "row", g.const(torch.tensor([1, 2])))
    g.save("h", g.read("blocks.0", x))
    saved(g, Chain(), x)
    assert capsys.readouterr().out == "sum: 4.0 row tensor([1, 2])\n"
    lines = []
    saved(g, Chain(), x, on_log=lines.append)
    assert len(lines) == 1


# Errors


def test_an_error_in_a_node_says_where():
    g, x = Builder(), example()
    h = g.read("blocks.0", x)
    g.save("h", g.call("mm", h, h))
    with pytest.raises(RuntimeError) as caught:
        saved(g, model := Chain(), x)
    assert caught.value.__notes__ == ["in torch.mm of the experiment, at user.py:101"]
    assert hook_count(model) == 0


class OwnError(Exception):
    pass


def failing(m, x):
    raise m.error


def test_the_models_own_error_comes_as_itself():
    model = Does(lambda m, x: m.inner(m.first(x)), first=nn.Identity(), inner=Does(failing))
    model.inner.error = error = OwnError("mine")
    g, x = Builder(), example()
    g.save("h", g.read("inner", x))
    with pytest.raises(OwnError) as caught:
        saved(g, model, x, line="user.py:7")
    assert caught.value is error
    assert error.__notes__ == ["while running the model for the block at user.py:7"]
    assert hook_count(model) == 0


def test_a_model_that_swallows_errors_does_not_swallow_ours():
    def forward(m, x):
        try:
            return m.inner(x)
        except Exception:  # noqa: BLE001
            return x

    model = Does(forward, inner=nn.Identity())
    g, x = Builder(), example()
    h = g.read("inner", x)
    g.save("h", g.call("mm", h, h))
    with pytest.raises(RuntimeError, match="must be a matrix"):
        saved(g, model, x)


def test_a_model_that_raises_because_of_ours_does_not_hide_it():
    def forward(m, x):
        try:
            return m.inner(x)
        except Exception as error:
            raise OwnError from error

    g, x = Builder(), example()
    h = g.read("inner", x)
    g.save("h", g.call("mm", h, h))
    with pytest.raises(RuntimeError, match="must be a matrix"):
        saved(g, Does(forward, inner=nn.Identity()), x)


def test_a_model_that_swallows_even_the_stop():
    def forward(m, x):
        with contextlib.suppress(BaseException):
            m.inner(x)
        return m.inner(x)

    g, x = Builder(), example()
    g.save("h", g.read("inner", x))
    same(saved(g, Does(forward, inner=nn.Identity()), x)["h"], x)


def test_what_was_not_reached_is_named_with_its_line():
    g, x = Builder(), example()
    g.save("h", g.read("blocks.0", x))
    g.save("k", g.read("blocks.0", x, call=1))
    with pytest.raises(NotReachedError, match=r"blocks\.0\.output call 1, at user\.py:102"):
        saved(g, Chain(), x)


def test_an_edit_that_was_not_reached_is_an_error_too():
    g, x = Builder(), example()
    g.write("blocks.0", g.const(x), call=3)
    with pytest.raises(NotReachedError, match="call 3"):
        saved(g, Chain(), x)


@pytest.mark.parametrize("path", ["blocks.9", "nothing", "blocks.0.linear.weight", "calls"])
def test_a_module_that_is_not_there(path):
    g, x = Builder(), example()
    g.save("h", g.read(path, x))
    with pytest.raises(WeftError, match="no module"):
        saved(g, model := Chain(), x)
    assert hook_count(model) == 0


def test_a_weight_that_is_not_there():
    g = Builder()
    g.save("w", g.param("blocks.0.linear.nothing", torch.ones(1)))
    with pytest.raises(WeftError, match="no weight"):
        saved(g, Chain(), example())


def test_a_weight_of_another_shape():
    g = Builder()
    g.save("w", g.param("head.weight", torch.ones(7, 8)))
    with pytest.raises(GraphError, match=r"'head.weight' should be float32\[7, 8\], but is"):
        saved(g, Chain(), example())


def test_a_tensor_that_cannot_be_edited_in_place_says_where():
    model = Does(lambda m, x: m.inner(x[:1].expand(2, 3, 8)), inner=nn.Identity())
    g, x = Builder(), example()
    h = g.read("inner", x)
    g.mul_(h, 2.0)
    g.fill("inner", h)
    with pytest.raises(RuntimeError) as caught:
        saved(g, model, x)
    assert caught.value.__notes__ == ["in the edit of inner.output in place"]


@pytest.mark.parametrize("where", ["begin", "fire", "late", "write", "interrupt", "log"])
def test_no_hook_survives_an_error(where):
    model, x, g = Chain(), example(), Builder()
    if where == "begin":
        g.save("m", g.call("mm", g.const(torch.ones(2)), g.const(torch.ones(2))))
    if where == "fire":
        h = g.read("blocks.1", x)
        g.save("m", g.call("mm", h, h))
    if where == "late":
        g.write("blocks.0", g.read("blocks.1", x))
    if where == "write":
        g.write("blocks.0", g.const(torch.ones(2)))
    if where == "interrupt":
        model.blocks[2].forward = lambda x: (_ for _ in ()).throw(KeyboardInterrupt())
    if where == "log":
        g.log(g.read("blocks.0", x))
    g.save("head", g.read("head", (2, 3, 5)))

    def on_log(text):
        raise OwnError

    with pytest.raises(BaseException):  # noqa: B017
        saved(g, model, x, on_log=on_log)
    assert hook_count(model) == 0
    model.blocks[2].__dict__.pop("forward", None)
    again = Builder()
    again.save("h", again.read("head", (2, 3, 5)))
    same(saved(again, model, x)["h"], model(x).detach())
