"""The loop without hooks or modules: a plain list of firings drives it."""

from __future__ import annotations

import pytest
import torch

from tests.run.graphs import Builder, site
from tests.run.nets import example, same
from weft.errors import GraphError, LateEditError, NotReachedError, ReadOnlyError
from weft.run.interpreter import Interpreter
from weft.run.logs import Lines
from weft.run.plan import plan


class NoModel:
    """A host without weights. `apply` doubles."""

    device = None

    def parameter(self, path):
        return torch.ones(8)

    def apply(self, path, args, kwargs):
        return args[0] * 2

    def is_weight(self, where):
        return False

    def is_anothers(self, where):
        return False


def drive(builder, firings, **options):
    """Runs a graph over `(path, value)` pairs: what was saved, and what the sites became."""
    run = Interpreter(builder.graph(), builder.constants, NoModel(), **options)
    became = []
    with torch.no_grad():
        run.begin()
        for path, value in firings:
            became.append(run.fire(site(path), value))
        return run.end(), became


def started(builder):
    run = Interpreter(builder.graph(), builder.constants, NoModel())
    run.begin()
    return run


# When a node runs


def test_sites_may_be_named_in_any_order():
    g, x = Builder(), example()
    late = g.read("b", x)
    early = g.read("a", x)
    g.save("sum", g.add2(late, early))
    saved, _ = drive(g, [("a", x), ("b", 3 * x)])
    same(saved["sum"], 4 * x)


def test_what_needs_no_site_runs_before_the_first():
    g, lines, x = Builder(), [], example()
    g.read("a", x)
    g.log("two is", g.mul(g.const(torch.tensor(1.0)), 2.0))
    run = Interpreter(g.graph(), g.constants, NoModel(), on_log=lines.append)
    run.begin()
    assert lines == ["two is 2.0"]
    assert run.finished


def test_ready_nodes_run_in_program_order(monkeypatch):
    g, ran, x = Builder(), [], example()
    h = g.read("b", x)
    for number in range(5):
        g.log(f"{number}", g.call("sum", g.read("a", x) if number % 2 else h))
    monkeypatch.setattr(Lines, "say", lambda self, index, parts: ran.append(parts[0]))
    drive(g, [("a", x), ("b", x)])
    assert ran == ["1", "3", "0", "2", "4"]


def five_lines(g, x, *more):
    """Of sites b, a, b, a, b, each with its number; then text."""
    h = g.read("b", x)
    for number in range(5):
        g.log(f"{number}", g.call("sum", g.read("a", x) if number % 2 else h))
    g.log("text")
    return [f"{number} 24.0" for number in range(5)] + ["text"]


def test_lines_come_in_program_order():
    g, lines, x = Builder(), [], torch.ones(2, 3, 4)
    expected = five_lines(g, x)
    drive(g, [("a", x), ("b", x)], on_log=lines.append)
    assert lines == expected


def test_a_line_comes_as_soon_as_it_may():
    g, lines, x = Builder(), [], example()
    h = g.read("b", x)
    g.log("begun")
    g.log("a", g.read("a", x))
    g.log("b", h)
    run = Interpreter(g.graph(), {}, NoModel(), on_log=lambda text: lines.append(text[:2]))
    run.begin()
    assert lines == ["be"]
    run.fire(site("a"), x)
    assert lines == ["be", "a "]
    run.fire(site("b"), x)
    assert lines == ["be", "a ", "b "]


def test_lines_that_wait_are_said_when_the_run_fails():
    g, lines, x = Builder(), [], example()
    g.log("b", g.call("sum", g.read("b", x)))
    g.log("text")
    run = Interpreter(g.graph(), {}, NoModel(), on_log=lines.append)
    run.begin()
    assert lines == []
    run.close()
    assert lines == ["text"]
    run.close()
    assert lines == ["text"]


def test_too_much_text_does_not_wait(monkeypatch):
    monkeypatch.setattr("weft.run.logs._HELD", 12)
    g, lines, x = Builder(), [], torch.ones(2, 3, 4)
    five_lines(g, x)
    drive(g, [("a", x), ("b", x)], on_log=lines.append)
    assert lines == ["1 24.0", "3 24.0", "text", "0 24.0", "2 24.0", "4 24.0"]


def test_a_step_runs_as_soon_as_its_site_fires():
    g, lines, x = Builder(), [], example()
    h = g.read("b", x)
    g.log("a", g.call("sum", g.read("a", x)))
    g.log("b", g.call("sum", h))
    run = Interpreter(g.graph(), {}, NoModel(), on_log=lambda text: lines.append(text[0]))
    run.begin()
    assert set(run.sites) == {site("a"), site("b")}
    run.fire(site("a"), x)
    assert lines == ["a"]
    assert set(run.sites) == {site("b")}


def test_finished_says_when_nothing_is_left():
    g, x = Builder(), example()
    g.save("a", g.read("a", x))
    run = started(g)
    assert not run.finished
    run.fire(site("a"), x)
    assert run.finished


def test_a_site_nobody_waits_for_is_left_alone():
    g, x = Builder(), example()
    g.save("a", g.read("a", x))
    value = (x, {"k": x})
    run = started(g)
    assert run.fire(site("other"), value) is value


# What is not needed


def test_dead_nodes_are_not_run():
    g, x = Builder(), example()
    h = g.read("a", x)
    g.call("mm", h, h)  # would raise: not matrices
    g.read("never", x)
    g.save("h", h)
    saved, _ = drive(g, [("a", x)])
    same(saved["h"], x)


def test_a_write_without_a_later_use_is_dead():
    g, x = Builder(), example()
    c = g.mul(g.read("a", x), 2.0)
    g.save("c", c)
    g.mul_(c, g.read("never", x))
    saved, _ = drive(g, [("a", x)])
    same(saved["c"], 2 * x)


def test_a_write_with_a_later_use_of_another_view_lives():
    g, x = Builder(), example()
    c = g.mul(g.read("a", x), 2.0)
    row = g.item(c, 0)
    g.mul_(row, 5.0)
    g.save("c", c)
    saved, _ = drive(g, [("a", x)])
    same(saved["c"], torch.cat([10 * x[:1], 2 * x[1:]]))


def test_sites_that_did_not_fire_are_named():
    g, x = Builder(), example()
    g.save("h", g.read("never", x))
    with pytest.raises(NotReachedError, match=r"never\.output, at user\.py:100"):
        drive(g, [("a", x)])


# Versions


def test_a_use_before_a_write_in_the_program_sees_the_old_value():
    g, x = Builder(), example()
    h = g.mul(g.read("a", x), 1.0)
    g.save("before", h)
    doubled = g.mul(h, 2.0)
    g.mul_(h, 10.0)
    g.save("after", h)
    g.save("doubled", doubled)
    saved, _ = drive(g, [("a", x)])
    same(saved["before"], x)
    same(saved["doubled"], 2 * x)
    same(saved["after"], 10 * x)


def test_a_waiting_use_gets_the_version_it_means_and_does_not_delay_the_write():
    g, x = Builder(), example()
    h = g.read("a", x)
    row = g.item(h, 0)
    mixed = g.add2(h, g.read("b", x))  # waits for b
    rows = g.add2(row, g.item(g.read("b", x), 0))
    g.mul_(h, 10.0)
    g.fill("a", h)  # must not wait for b
    g.save("mixed", mixed)
    g.save("rows", rows)
    g.save("h", h)
    own = x.clone()
    saved, (became, _) = drive(g, [("a", own), ("b", 2 * x)])
    same(became, 10 * x)
    same(saved["mixed"], 3 * x)
    same(saved["rows"], 3 * x[0])
    same(saved["h"], 10 * x)


def test_each_waiting_use_gets_its_own_version():
    g, x = Builder(), example()
    h = g.mul(g.read("a", x), 1.0)
    b = g.read("b", x)
    uses = []
    for _ in range(3):
        uses.append(g.add2(h, b))
        g.mul_(h, 10.0)
    for number, use in enumerate(uses):
        g.save(f"{number}", use)
    g.save("h", h)
    saved, _ = drive(g, [("a", x), ("b", torch.zeros_like(x))])
    for number in range(3):
        same(saved[f"{number}"], 10**number * x)
    same(saved["h"], 1000 * x)


def test_a_waiting_save_keeps_its_version():
    g, x = Builder(), example()
    h = g.mul(g.read("a", x), 1.0)
    g.save("pair", (h, g.read("b", x)))
    g.mul_(h, 10.0)
    g.save("h", h)
    saved, _ = drive(g, [("a", x), ("b", 2 * x)])
    same(saved["pair"][0], x)
    same(saved["h"], 10 * x)


def test_writes_reach_every_view_whatever_its_place_in_the_program():
    g, x = Builder(), example()
    h = g.read("a", x)
    early = g.item(h, slice(None), -1)
    g.mul_(h, 2.0)
    late = g.item(h, slice(None), -1)
    g.add_(early, 1.0)
    g.fill("a", h)
    g.save("late", late)
    saved, (became,) = drive(g, [("a", x.clone())])
    expected = 2 * x
    expected[:, -1] += 1
    same(became, expected)
    same(saved["late"], expected[:, -1])


def test_a_write_waits_for_the_views_before_it():
    """A view that a later site shapes is still a view of what is edited."""
    g, x = Builder(), example()
    h = g.mul(g.read("a", x), 1.0)
    view = g.call("Tensor.view_as", h, g.read("b", (6, 8)), alias=(h,))
    g.mul_(h, 10.0)
    g.save("view", view)
    saved, _ = drive(g, [("a", x), ("b", torch.zeros(6, 8))])
    same(saved["view"], 10 * x.view(6, 8))


def test_the_result_of_an_in_place_operation_is_its_argument():
    g, x = Builder(), example()
    h = g.mul(g.read("a", x), 1.0)
    alias = g.add_(h, 1.0)
    g.mul_(alias, 2.0)
    g.save("h", h)
    saved, _ = drive(g, [("a", x)])
    same(saved["h"], 2 * (x + 1))


def test_an_argument_of_a_write_is_taken_at_its_time():
    g, x = Builder(), example()
    a = g.mul(g.read("a", x), 1.0)
    b = g.mul(g.read("a", x), 3.0)
    g.add_(a, b)
    g.mul_(b, 100.0)
    g.save("a", a)
    g.save("b", b)
    saved, _ = drive(g, [("a", x)])
    same(saved["a"], 4 * x)
    same(saved["b"], 300 * x)


# Late edits


def test_a_late_edit_names_both_lines_and_sites():
    g, x = Builder(), example()
    late = g.read("b", x)
    g.write("a", g.mul(late, 2.0))
    with pytest.raises(LateEditError) as caught:
        drive(g, [("a", x), ("b", x)])
    text = str(caught.value)
    assert "a.output" in text and "b.output" in text
    assert "user.py:100" in text and "user.py:102" in text


def test_an_edit_from_an_earlier_site_is_not_late():
    g, x = Builder(), example()
    g.write("b", g.mul(g.read("a", x), 2.0))
    _, became = drive(g, [("a", x), ("b", x)])
    same(became[1], 2 * x)


def test_a_late_fill_is_refused():
    g, x = Builder(), example()
    h = g.read("a", x)
    g.add_(h, g.read("b", x))
    g.fill("a", h)
    with pytest.raises(LateEditError, match=r"b\.output"):
        drive(g, [("a", x), ("b", x)])


# Weights, constants


def test_nothing_writes_into_a_weight():
    g = Builder()
    w = g.param("w", torch.ones(8))
    g.mul_(g.item(w, 0), 2.0)
    g.save("w", w)
    with pytest.raises(ReadOnlyError, match="weight 'w'"):
        plan(g.graph())


def test_a_written_constant_is_a_copy_of_the_clients():
    g, c = Builder(), torch.ones(3)
    ref = g.const(c)
    g.mul_(ref, 5.0)
    g.save("c", ref)
    saved, _ = drive(g, [])
    same(saved["c"], torch.full((3,), 5.0))
    same(c, torch.ones(3))


def test_a_constant_must_be_there_and_as_recorded():
    g = Builder()
    g.save("c", g.mul(g.const(torch.ones(3)), 2.0))
    with pytest.raises(GraphError, match="missing"):
        Interpreter(g.graph(), {}, NoModel()).begin()
    with pytest.raises(GraphError, match=r"float32\[3\].*float32\[4\]"):
        Interpreter(g.graph(), {"c0": torch.ones(4)}, NoModel()).begin()


# Arguments


def test_every_form_of_argument_reaches_the_operation():
    g, x = Builder(), example()
    h = g.read("a", x)
    g.save("cat", g.call("cat", [h, h, h], dim=1))
    g.save("index", g.call("Tensor.__getitem__", h, (..., slice(1, None, 2), None)))
    g.save("dtype", g.call("Tensor.to", h, torch.float64))
    g.save("filled", g.call("masked_fill", h, g.call("gt", h, 0.0), float("-inf")))
    saved, _ = drive(g, [("a", x)])
    same(saved["cat"], torch.cat([x, x, x], dim=1))
    same(saved["index"], x[..., 1::2, None])
    assert saved["dtype"].dtype is torch.float64
    assert torch.equal(saved["filled"], x.masked_fill(x > 0, float("-inf")))


def test_a_tensor_in_an_index_and_in_a_slice():
    g, x = Builder(), example(4)
    h = g.read("a", x)
    rows, start = g.const(torch.tensor([2, 0])), g.const(torch.tensor(1))
    g.save("rows", g.call("Tensor.__getitem__", h, (rows, slice(start, None))))
    saved, _ = drive(g, [("a", x)])
    same(saved["rows"], x[torch.tensor([2, 0]), 1:])


def test_several_results():
    g, x = Builder(), example()
    values = g.call("topk", g.read("a", x), 2, outs=2, alias=(None, None))
    g.save("values", values)
    g.save("indices", g.out(values, 1))
    saved, _ = drive(g, [("a", x)])
    expected = x.topk(2)
    same(saved["values"], expected.values)
    assert torch.equal(saved["indices"], expected.indices)


def test_containers_and_plain_values_come_back_as_saved():
    g, x = Builder(), example()
    h = g.read("a", x)
    g.save("all", {"list": [h, 1], "tuple": (g.mul(h, 2.0), "text", None)})
    saved, _ = drive(g, [("a", x)])
    found = saved["all"]
    assert type(found["list"]) is list and type(found["tuple"]) is tuple
    assert found["list"][1] == 1 and found["tuple"][1:] == ("text", None)
    same(found["tuple"][0], 2 * x)


def test_saves_come_in_program_order():
    g, x = Builder(), example()
    g.save("late", g.read("b", x))
    g.save("early", g.read("a", x))
    saved, _ = drive(g, [("a", x), ("b", x)])
    assert list(saved) == ["late", "early"]


# Draws


def test_drawn_numbers_depend_on_seed_and_draw_only():
    def draw(seed, number, more=0):
        g, x = Builder(seed), example()
        h = g.read("a", x)
        for extra in range(more):
            g.save(f"extra{extra}", g.call("randn_like", h, draw=50 + extra))
        g.save("r", g.call("randn_like", h, draw=number))
        return drive(g, [("a", x)])[0]["r"]

    assert torch.equal(draw(1, 2), draw(1, 2, more=2))
    assert not torch.equal(draw(1, 2), draw(1, 3))
    assert not torch.equal(draw(1, 2), draw(2, 2))


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    g = Builder()
    g.save("r", g.call("randn", 3, draw=0))
    drive(g, [])
    assert torch.equal(before, torch.get_rng_state())


def test_a_shape_is_taken_when_the_graph_runs():
    from weft.graph.node import Call, Seq, Shape

    g, x = Builder(), example()
    h = g.read("a", x)
    zeros = g.add(Call, op="zeros", args=(Shape(h),))
    ones = g.add(Call, op="ones", args=(Seq("tuple", (2, 2)),))
    g.save("zeros", zeros)
    g.save("ones", ones)
    saved, _ = drive(g, [("a", x)])
    same(saved["zeros"], torch.zeros_like(x))
    same(saved["ones"], torch.ones(2, 2))
