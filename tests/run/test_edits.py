"""Edits: fill and write, against plain hooks that do the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.run.graphs import Builder
from tests.run.nets import Chain, Does, Pair, Record, example, hooked, moved, same
from weft.errors import (
    GraphError,
    OverwrittenError,
    ReadOnlyError,
    SiteMismatchError,
    WriteMismatchError,
)
from weft.run import run


def passed(g, module, *args, **options):
    """The result and the saves of a run that goes to the end."""
    found = run(g.graph(), g.constants, module, args, want_result=True, **options)
    return found.result, found.saved


def plain(module, *args):
    with torch.no_grad():
        return module(*args)


# Fill: in place, in the model's own tensor


def test_a_fill_is_what_a_hook_in_place_does():
    model, x = Chain(), example()
    g = Builder()
    h = g.read("blocks.1", x)
    g.set(h, (slice(None), -1), g.mul(g.item(h, slice(None), 0), 3.0))
    g.fill("blocks.1", h)
    result, _ = passed(g, model, x)

    def edit(out):
        out[:, -1] = out[:, 0] * 3

    with hooked((model.blocks[1], edit)):
        expected = model(x)
    same(result, expected)
    moved(result, plain(model, x))


def test_a_fill_reaches_whatever_shares_the_tensor_and_a_write_does_not():
    """The residual stream and the norm's input are one tensor (as in GPT-2)."""
    model, x = Chain(), example()
    fill, write = Builder(), Builder()
    leaf = (0, 0)
    h = fill.read("blocks.2.norm", x, leaf=leaf, port="inputs")
    fill.mul_(h, 0.0)
    fill.fill("blocks.2.norm", h, leaf=leaf, port="inputs")
    zeros = write.call("zeros", 2, 3, 8)
    write.write("blocks.2.norm", zeros, leaf=leaf, port="inputs")
    filled, _ = passed(fill, model, x)
    written, _ = passed(write, model, x)

    def expected(pre):
        handle = model.blocks[2].norm.register_forward_pre_hook(lambda m, args: pre(args[0]))
        result = plain(model, x)
        handle.remove()
        return result

    same(filled, expected(lambda t: t.zero_()))
    same(written, expected(torch.zeros_like))
    moved(filled, written)


def test_the_model_gets_its_own_tensor_back():
    kept = []
    model = Does(lambda m, x: m.inner(x * 1), inner=nn.Identity())
    model.inner.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    g, x = Builder(), example()
    h = g.read("inner", x)
    g.mul_(h, 2.0)
    g.fill("inner", h)
    result, _ = passed(g, model, x)
    assert result is kept[0]


def test_a_fill_of_a_tensor_in_another_layout():
    """The copy goes to the model's own tensor, whatever its strides are."""
    model = Does(lambda m, x: (m.inner(x.transpose(0, 1)), x), inner=nn.Identity())
    g, x = Builder(), example()
    h = g.read("inner", (3, 2, 8))
    g.mul_(g.item(h, 0), 5.0)
    g.fill("inner", h)
    (inner, whole), _ = passed(g, model, x)
    expected = x.clone()
    expected[:, 0] *= 5
    same(inner, expected.transpose(0, 1))
    same(whole, expected)


@pytest.mark.parametrize("direct", [True, False])
def test_an_edit_never_changes_an_earlier_site(direct):
    """`first` and `second` hand out one tensor; only the second is edited."""
    model = Does(lambda m, x: m.second(m.first(x * 1)), first=nn.Identity(), second=nn.Identity())
    g, x = Builder(), example()
    early = g.read("first", x)
    row = g.item(early, 0)
    g.save("early", early)
    h = g.read("second", x)
    if not direct:
        g.save("other", g.read("second", x, leaf=()))
    g.mul_(h, 10.0)
    g.fill("second", h)
    g.save("after", g.mul(early, 1.0))  # may run after the edit
    g.save("row", g.add2(row, g.item(g.read("", x), 0)))
    result, saved = passed(g, model, x)
    same(result, 10 * x)
    same(saved["early"], x)
    same(saved["after"], x)
    same(saved["row"], 11 * x[0])


def test_a_read_after_a_fill_sees_it_and_one_before_does_not():
    model, x = Chain(), example()
    g = Builder()
    before = g.read("blocks.0", x)
    h = g.read("blocks.0", x)
    g.mul_(h, 3.0)
    g.fill("blocks.0", h)
    after = g.read("blocks.0", x)
    for name, ref in (("before", before), ("after", after)):
        g.save(name, ref)
    _, saved = passed(g, model, x)
    same(saved["before"], plain(model.blocks[0], x))
    same(saved["after"], 3 * plain(model.blocks[0], x))


@pytest.mark.parametrize("filled", [True, False])
def test_a_read_between_an_edit_and_its_fill_does_not_see_it(filled):
    model, x = Chain(), example()
    g = Builder()
    h = g.read("blocks.0", x)
    if filled:
        g.mul_(h, 2.0)
        g.fill("blocks.0", h)
    g.mul_(h, 5.0)
    g.save("between", g.read("blocks.0", x))
    g.fill("blocks.0", h)
    result, saved = passed(g, model, x)
    factor = 2 if filled else 1
    same(saved["between"], factor * plain(model.blocks[0], x))
    with hooked((model.blocks[0], lambda out: 5 * factor * out)):
        same(result, model(x))


def test_a_read_between_two_fills_of_one_handle_keeps_its_version():
    model, x = Chain(), example()
    g = Builder()
    h = g.read("blocks.0", x)
    g.mul_(h, 2.0)
    g.fill("blocks.0", h)
    between = g.read("blocks.0", x)
    g.save("between", between)
    g.mul_(h, 5.0)
    g.fill("blocks.0", h)
    g.save("later", g.add2(between, g.read("blocks.1", x)))
    result, saved = passed(g, model, x)
    first = plain(model.blocks[0], x)
    same(saved["between"], 2 * first)
    same(saved["later"], 2 * first + plain(model.blocks[1], 10 * first))
    with hooked((model.blocks[0], lambda out: 10 * out)):
        same(result, model(x))


def test_the_last_of_several_fills_counts():
    model, x = Chain(), example()
    g = Builder()
    for factor in (2.0, 5.0):
        h = g.read("blocks.0", x)
        g.mul_(h, factor)
        g.fill("blocks.0", h)
    g.save("h", g.read("blocks.0", x))
    result, saved = passed(g, model, x)
    with hooked((model.blocks[0], lambda out: 10 * out)):
        same(result, model(x))
    same(saved["h"], 10 * plain(model.blocks[0], x))


def test_a_fill_keeps_its_version():
    """An edit of the same handle after the fill does not belong to the site any more."""
    model, x = Chain(), example()
    g = Builder()
    h = g.read("blocks.0", x)
    g.mul_(h, 2.0)
    g.fill("blocks.0", h)
    again = g.read("blocks.0", x)
    g.mul_(h, 100.0)
    g.save("h", h)
    g.save("again", again)
    result, saved = passed(g, model, x)
    with hooked((model.blocks[0], lambda out: 2 * out)):
        same(result, model(x))
    same(saved["h"], 200 * plain(model.blocks[0], x))
    same(saved["again"], 2 * plain(model.blocks[0], x))


def test_a_read_that_was_edited_later_still_is_what_it_was():
    model, x = Chain(), example()
    g = Builder()
    h = g.read("blocks.0", x)
    g.mul_(h, 2.0)
    g.fill("blocks.0", h)
    again = g.read("blocks.0", x)
    g.mul_(again, 3.0)
    g.fill("blocks.0", again)
    g.save("h", h)
    result, saved = passed(g, model, x)
    with hooked((model.blocks[0], lambda out: 6 * out)):
        same(result, model(x))
    same(saved["h"], 2 * plain(model.blocks[0], x))


def test_an_edit_without_a_fill_stays_private():
    model, x = Chain(), example()
    g = Builder()
    h = g.read("blocks.0", x)
    g.mul_(h, 2.0)
    g.save("h", h)
    result, saved = passed(g, model, x)
    same(result, plain(model, x))
    same(saved["h"], 2 * plain(model.blocks[0], x))


def test_an_edit_of_one_leaf_does_not_show_at_another_that_shares_it():
    model = Does(lambda m, x: m.inner(x * 1), inner=Does(lambda m, x: (x, x)))
    g, x = Builder(), example()
    h = g.read("inner", x, leaf=(0,))
    g.mul_(h, 2.0)
    g.fill("inner", h, leaf=(0,))
    g.save("other", g.read("inner", x, leaf=(1,)))
    (one, two), saved = passed(g, model, x)
    same(saved["other"], x)  # the copy comes at the end of the hook
    same(one, 2 * x)
    same(two, 2 * x)


# What may not be changed


def test_the_callers_tensors_never_change():
    model = Does(lambda m, x, rest: m.inner(x) + rest["y"][0], inner=nn.Identity())
    g, x = Builder(), example()
    rest = {"y": [x.clone()]}
    h = g.read("inner", x)
    g.mul_(h, 10.0)
    g.fill("inner", h)
    k = g.read("", x, leaf=(0, 1, "y", 0), port="inputs")
    g.mul_(k, 3.0)
    g.fill("", k, leaf=(0, 1, "y", 0), port="inputs")
    before = x.clone()
    result, _ = passed(g, model, x, rest)
    same(x, before)
    same(rest["y"][0], before)
    same(result, 13 * x)


@pytest.mark.parametrize("buffer", [False, True])
def test_a_fill_into_a_weight_is_refused(buffer):
    inner = Does(lambda m, x: m.table[:2])
    table = torch.ones(3, 8)
    inner.register_buffer("table", table) if buffer else inner.register_parameter(
        "table", nn.Parameter(table)
    )
    model = Does(lambda m, x: m.inner(x) + x, inner=inner)
    g = Builder()
    h = g.read("inner", (2, 8))
    g.mul_(h, 10.0)
    g.fill("inner", h)
    with pytest.raises(ReadOnlyError, match=r"inner\.output") as caught:
        passed(g, model, example(2, 8)[:, 0])
    assert caught.value.line == "user.py:102"
    assert torch.equal(inner.table.detach(), torch.ones(3, 8))


def test_a_weight_that_moved_is_still_a_weight():
    model = Does(lambda m, x: m.inner(x) + x, inner=Does(lambda m, x: m.table))
    model.inner.register_buffer("table", torch.ones(2, 8))
    g = Builder()
    h = g.read("inner", (2, 8), dtype=torch.float64)
    g.mul_(h, 10.0)
    g.fill("inner", h)
    plain_g = Builder()
    plain_g.save("x", plain_g.read("", (2, 8)))
    run(plain_g.graph(), {}, model, (torch.ones(2, 8),))  # the weights are known now
    model.double()
    with pytest.raises(ReadOnlyError):
        passed(g, model, torch.ones(2, 8, dtype=torch.float64))


def test_a_tensor_that_was_a_weight_once_may_be_edited():
    old = torch.ones(2, 8)
    model = Does(lambda m, x: m.inner(old) + x, inner=nn.Identity())
    for number in range(3):
        setattr(model, f"part{number}", nn.Module())
        getattr(model, f"part{number}").register_buffer("table", torch.ones(2, 8))
    model.part1.table = old
    plain_g = Builder()
    plain_g.save("x", plain_g.read("", (2, 8)))
    run(plain_g.graph(), {}, model, (torch.ones(2, 8),))  # the weights are known now
    model.part1.table = torch.zeros(2, 8)
    g = Builder()
    h = g.read("inner", (2, 8))
    g.mul_(h, 10.0)
    g.fill("inner", h)
    same(passed(g, model, torch.ones(2, 8))[0], torch.full((2, 8), 11.0))


# Write: another tensor in place of the model's own


def test_a_write_replaces_the_output():
    model, x = Chain(), example()
    g = Builder()
    g.write("blocks.2", g.mul(g.read("blocks.0", x), -1.0))
    result, _ = passed(g, model, x)
    replaced = -plain(model.blocks[0], x)
    with hooked((model.blocks[2], lambda out: replaced)):
        same(result, model(x))
    moved(result, plain(model, x))


def test_a_read_after_a_write_sees_the_written_value():
    model, x = Chain(), example()
    g = Builder()
    g.write("blocks.0", g.const(torch.full_like(x, 2.0)))
    g.save("h", g.read("blocks.0", x))
    _, saved = passed(g, model, x)
    same(saved["h"], torch.full_like(x, 2.0))


def test_an_edit_after_a_write_edits_the_written_value():
    model, x = Chain(), example()
    g = Builder()
    c = g.const(torch.full_like(x, 2.0))
    g.write("blocks.0", c)
    h = g.read("blocks.0", x)
    g.mul_(h, 3.0)
    g.fill("blocks.0", h)
    g.save("c", c)
    g.save("h", g.read("blocks.0", x))
    result, saved = passed(g, model, x)
    with hooked((model.blocks[0], lambda out: torch.full_like(out, 6.0))):
        same(result, model(x))
    same(saved["c"], torch.full_like(x, 2.0))
    same(saved["h"], torch.full_like(x, 6.0))


def test_a_write_after_a_fill_gives_both():
    """The norm's input is filled (the residual sees that), then rebound (it does not)."""
    model, x = Chain(), example()
    g = Builder()
    place = {"leaf": (0, 0), "port": "inputs"}
    h = g.read("blocks.2.norm", x, **place)
    g.mul_(h, 3.0)
    g.fill("blocks.2.norm", h, **place)
    other = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3))
    g.write("blocks.2.norm", g.const(other), **place)
    result, _ = passed(g, model, x)

    def pre(module, args):
        args[0].mul_(3)
        return other

    handle = model.blocks[2].norm.register_forward_pre_hook(pre)
    expected = plain(model, x)
    handle.remove()
    same(result, expected)


@pytest.mark.parametrize("source", ["const", "site"])
def test_a_write_takes_its_value_at_its_own_place_in_the_program(source):
    model, x = Chain(), example()
    g = Builder()
    c = g.mul(g.const(torch.ones_like(x)), 1.0)
    if source == "site":  # then the write runs before the edit
        c = g.call("ones_like", g.read("blocks.0", x))
    g.write("blocks.0", c)
    g.mul_(c, 50.0)
    g.save("c", c)
    result, saved = passed(g, model, x)
    with hooked((model.blocks[0], lambda out: torch.ones_like(out))):
        same(result, model(x))
    same(saved["c"], torch.full_like(x, 50.0))


@pytest.mark.parametrize("source", ["const", "saved", "used", "site", "param", "apply", "twice"])
def test_what_was_written_is_safe_from_the_model(source):
    """`inner`'s output is overwritten by the model; nobody else's tensor may change."""

    def forward(m, x):
        x = m.first(x * 1)
        y = m.inner(x)
        y += 100
        z = m.second(x)
        z += 100
        return m.last(y + z)

    parts = {name: nn.Identity() for name in ("first", "inner", "second", "last")}
    model = Does(forward, **parts, norm=nn.LayerNorm(8))
    c, x, g = torch.full((2, 3, 8), 2.0), example(), Builder()
    h = g.read("first", x)
    ref = {
        "const": lambda: g.const(c),
        "saved": lambda: g.mul(h, 2.0),
        "used": lambda: g.mul(h, 2.0),
        "site": lambda: h,
        "param": lambda: g.view("Tensor.expand", g.param("norm.weight", torch.ones(8)), 2, 3, 8),
        "apply": lambda: g.apply("norm", h),
        "twice": lambda: g.mul(h, 2.0),
    }[source]()
    g.write("inner", ref)
    if source == "saved":
        g.save("saved", ref)
    if source == "used":
        g.save("used", g.mul(g.read("last", x), ref))
    if source == "twice":
        g.write("second", ref)
    g.save("h", g.mul(h, 1.0))
    result, saved = passed(g, model, x)
    same(c, torch.full((2, 3, 8), 2.0))
    same(model.norm.weight.detach(), torch.ones(8))
    same(saved["h"], x)
    value = {"const": c, "site": x, "param": torch.ones(8)}.get(source, 2 * x)
    if source == "apply":
        value = plain(model.norm, x)
    same(result, value + 100 + (value if source == "twice" else x) + 100)
    if source == "saved":
        same(saved["saved"], 2 * x)
    if source == "used":
        same(saved["used"], (2 * x + x + 200) * 2 * x)


def test_one_value_written_to_two_leaves_is_two_tensors():
    def forward(m, x):
        a, b = m.inner(x)
        a += 100
        return a, b

    model = Does(forward, inner=Does(lambda m, x: (x * 1, x * 1)))
    g, x = Builder(), example()
    value = g.mul(g.read("inner", x, leaf=(0,)), 2.0)
    for leaf in (0, 1):
        g.write("inner", value, leaf=(leaf,))
    (a, b), _ = passed(g, model, x)
    same(a, 2 * x + 100)
    same(b, 2 * x)


def test_a_read_of_a_written_value_is_safe_from_the_model():
    def forward(m, x):
        y = m.inner(x * 1)
        y += 100
        return m.last(y)

    model = Does(forward, inner=nn.Identity(), last=nn.Identity())
    g, x = Builder(), example()
    g.write("inner", g.mul(g.const(torch.ones(2, 3, 8)), 2.0))
    h = g.read("inner", x)
    g.save("h", h)
    g.save("later", g.add2(h, g.read("last", x)))
    _, saved = passed(g, model, x)
    same(saved["h"], torch.full_like(x, 2.0))
    same(saved["later"], torch.full_like(x, 104.0))


@pytest.mark.parametrize("cast", [True, False])
def test_a_written_value_that_was_read_again_is_not_handed_over(cast):
    def forward(m, x):
        y = m.inner(x * 1)
        y += 100
        return m.last(y)

    model = Does(forward, inner=nn.Identity(), last=nn.Identity())
    g, x = Builder(), example()
    ones = torch.ones(2, 3, 8, dtype=torch.float64 if cast else torch.float32)
    g.write("inner", g.mul(g.const(ones), 2.0))
    g.save("later", g.add2(g.read("inner", x), g.read("last", x)))
    _, saved = passed(g, model, x)
    same(saved["later"], torch.full_like(x, 104.0))


def test_a_written_value_that_nobody_needs_is_handed_over_without_a_copy():
    seen = []
    model = Does(lambda m, x: m.last(m.inner(x)), inner=nn.Identity(), last=nn.Identity())
    model.last.register_forward_pre_hook(lambda m, args: seen.append(args[0].data_ptr()))
    g, x, made = Builder(), example(), []
    fresh = g.mul(g.read("inner", x), 2.0)
    g.write("inner", fresh)
    mul = torch.mul

    def spy(*args):
        result = mul(*args)
        made.append(result.data_ptr())
        return result

    from weft.run import plan

    functions = dict(plan.CALLED)
    plan.CALLED["mul"] = spy
    plan._PLANS.clear()
    try:
        passed(g, model, x)
    finally:
        plan.CALLED.update(functions)
        plan._PLANS.clear()
    assert seen == made


def test_a_write_is_cast_to_the_sites_floating_dtype():
    model, x = Chain(), example()
    g = Builder()
    g.write("blocks.0", g.const(torch.full((2, 3, 8), 0.5, dtype=torch.float64)))
    h = g.read("blocks.0", x)
    g.save("h", h)
    result, saved = passed(g, model, x)
    assert saved["h"].dtype is torch.float32 and result.dtype is torch.float32


@pytest.mark.parametrize(
    "value", [torch.ones(2, 3, 1), torch.ones(2, 3, 8, dtype=torch.int64), torch.ones(8)]
)
def test_a_write_must_fit_exactly(value):
    model, x = Chain(), example()
    g = Builder()
    g.write("blocks.0", g.const(value))
    with pytest.raises(WriteMismatchError) as caught:
        passed(g, model, x)
    assert "blocks.0.output is float32[2, 3, 8]" in str(caught.value)
    assert caught.value.line == "user.py:101"


# Structures


@pytest.mark.parametrize(
    ("wrap", "leaf"),
    [
        (lambda t: (t, None), (0,)),
        (lambda t: [1, t], (1,)),
        (lambda t: Pair(t, "text"), (0,)),
        (lambda t: {"a": {"b": t}}, ("a", "b")),
        (lambda t: Record(t, "text"), ("hidden",)),
        (lambda t: (({"x": [t]},),), (0, 0, "x", 0)),
    ],
)
@pytest.mark.parametrize("how", ["write", "fill"])
def test_every_structure_keeps_its_type_and_the_models_own_is_not_touched(wrap, leaf, how):
    x, made = example(), []

    def inner(m, x):
        made.append(wrap(x * 1))
        return made[0]

    model = Does(lambda m, x: m.inner(x), inner=Does(inner))
    g = Builder()
    h = g.read("inner", x, leaf=leaf)
    if how == "write":
        g.write("inner", g.mul(h, 2.0), leaf=leaf)
    else:
        g.mul_(h, 2.0)
        g.fill("inner", h, leaf=leaf)
    result, _ = passed(g, model, x)
    from weft.run.structure import at

    same(at(result, leaf), 2 * x)
    assert type(result) is type(made[0])
    if how == "write":
        assert result is not made[0]
        same(at(made[0], leaf), x)
    else:
        assert result is made[0]
    if isinstance(result, (Pair, Record)):
        assert result[1] == "text" if isinstance(result, Pair) else result.extra == "text"


def test_a_model_output_keeps_names_and_attributes():
    from transformers.modeling_outputs import BaseModelOutput

    made = []

    def inner(m, x):
        made.append(BaseModelOutput(last_hidden_state=x * 1, hidden_states=(x, x)))
        return made[0]

    model = Does(lambda m, x: m.inner(x), inner=Does(inner))
    g, x = Builder(), example()
    g.write("inner", g.const(torch.ones_like(x)), leaf=("last_hidden_state",))
    g.write("inner", g.const(torch.zeros_like(x)), leaf=("hidden_states", 1))
    result, _ = passed(g, model, x)
    assert type(result) is BaseModelOutput
    same(result.last_hidden_state, torch.ones_like(x))
    same(result["last_hidden_state"], torch.ones_like(x))
    same(result.hidden_states[1], torch.zeros_like(x))
    same(made[0].last_hidden_state, x)


def test_keyword_inputs_are_read_and_written():
    model = Does(lambda m, x: m.inner(1, y=x, z=None), inner=Does(lambda m, a, y, z: y + a))
    g, x = Builder(), example()
    place = {"leaf": (1, "y"), "port": "inputs"}
    g.save("y", g.read("inner", x, **place))
    g.write("inner", g.mul(g.read("inner", x, **place), 3.0), **place)
    result, saved = passed(g, model, x)
    same(saved["y"], x)
    same(result, 3 * x + 1)


@pytest.mark.parametrize("leaf", [(3,), ("a",), (1,), (0, 0)])
def test_a_leaf_that_is_no_tensor(leaf):
    model = Does(lambda m, x: m.inner(x)[0], inner=Does(lambda m, x: (x, None)))
    g, x = Builder(), example()
    g.save("h", g.read("inner", x, leaf=leaf))
    with pytest.raises(SiteMismatchError, match=r"inner\.output") as caught:
        passed(g, model, x)
    assert caught.value.line == "user.py:100"


# Views that turn out to be copies, and the other way round


def test_a_copy_where_a_view_was_recorded():
    model, x = Does(lambda m, x: m.inner(x), inner=nn.Identity()), example()
    g = Builder()
    h = g.mul(g.read("inner", x), 1.0)
    turned = g.view("transpose", h, 1, 2)
    flat = g.view("reshape", turned, (-1,))  # a copy: not contiguous
    g.mul_(flat, 2.0)
    g.save("h", h)
    with pytest.raises(GraphError, match="gave a copy where the recording had a view") as caught:
        passed(g, model, x)
    assert caught.value.line == "user.py:103"


def test_a_view_where_a_copy_was_recorded():
    model, x = Does(lambda m, x: m.inner(x), inner=nn.Identity()), example()
    g = Builder()
    h = g.read("inner", x)
    flat = g.call("reshape", h, (-1,))  # a view here
    g.mul_(flat, 2.0)
    other = g.call("reshape", h, (-1,))
    g.save("flat", flat)
    g.save("other", other)
    g.save("h", h)
    result, saved = passed(g, model, x)
    same(saved["flat"], 2 * x.reshape(-1))
    same(saved["h"], x)
    same(saved["other"], x.reshape(-1))
    same(result, x)


def test_the_source_of_a_recorded_copy_is_edited():
    model, x = Does(lambda m, x: m.inner(x), inner=nn.Identity()), example()
    g = Builder()
    h = g.read("inner", x)
    flat = g.call("reshape", h, (-1,))  # a view here
    g.mul_(h, 2.0)
    g.save("flat", flat)
    g.save("h", h)
    _, saved = passed(g, model, x)
    same(saved["flat"], x.reshape(-1))
    same(saved["h"], 2 * x)


# Apply


def test_apply_runs_a_module_and_fires_no_site():
    model, x = Chain(), example()
    g = Builder()
    g.save("lens", g.apply("head", g.apply("blocks.3", g.read("blocks.0", x))))
    g.save("h", g.read("blocks.3.linear", x))
    _, saved = passed(g, model, x)
    first = plain(model.blocks[0], x)
    same(saved["lens"], plain(model.head, plain(model.blocks[3], first)))
    hidden = plain(model.blocks[2], plain(model.blocks[1], first))
    same(saved["h"], plain(model.blocks[3].linear, plain(model.blocks[3].norm, hidden)))


def test_what_apply_returns_may_be_edited():
    model = Does(lambda m, x: m.inner(x) + m.weight, inner=nn.Identity())
    model.weight = nn.Parameter(torch.ones(8))
    model.give = Does(lambda m, x: model.weight)
    g, x = Builder(), example()
    h = g.read("inner", x)
    passed_through = g.apply("inner", h)
    g.mul_(passed_through, 7.0)
    g.save("edited", passed_through)
    weight = g.apply("give", h)
    g.mul_(weight, 7.0)
    g.save("weight", weight)
    result, saved = passed(g, model, x)
    same(saved["edited"], 7 * x)
    same(saved["weight"], torch.full((8,), 7.0))
    same(result, x + 1)


def test_a_module_that_changes_its_argument():
    model = Does(lambda m, x: m.inner(x), inner=nn.Identity(), relu=nn.ReLU(inplace=True))
    g, x, c = Builder(), example(), torch.full((3,), -1.0)
    g.save("fresh", g.apply("relu", g.mul(g.read("inner", x), 1.0)))
    g.save("const", g.apply("relu", g.const(c)))
    _, saved = passed(g, model, x)
    same(saved["fresh"], x.relu())
    same(saved["const"], torch.zeros(3))
    same(c, torch.full((3,), -1.0))
    g = Builder()
    h = g.mul(g.read("inner", x), 1.0)
    g.save("relu", g.apply("relu", h))
    g.save("h", g.mul(h, 1.0))
    with pytest.raises(OverwrittenError, match="'relu' changed its argument"):
        passed(g, model, x)
