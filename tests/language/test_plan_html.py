"""`tracer.plan()` line by line and site by site, as text and as a page."""

from __future__ import annotations

from contextlib import contextmanager
from html.parser import HTMLParser

import pytest
import torch

import weft
from tests.families import zoo

A, B, C = ([zoo.tokens(n, seed=n)[0]] for n in (9, 5, 7))


class Page(HTMLParser):
    """Rows of cells of each table; raises for tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        assert self._open[-1] in ("td", "th")
        self.tables[-1][-1][-1] += data


@contextmanager
def counted(net):
    """Counts the calls of a module."""
    calls = []
    hook = net.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


def plan_of(model, ids, v):
    with model.scan(ids) as tracer:
        model.transformer.h[0].output[:, -1] += v
        weft.save([layer.mlp.output.sum() for layer in model.transformer.h], "sums")
        model.transformer.h[2].output = model.transformer.h[1].output * 2
        model.lm_head(model.transformer.h[1].output).save("lens")
        tracer.log("mean", model.transformer.h[0].output.mean())
    return tracer.plan()


def test_lines_add_up_to_the_whole(model, ids, v):
    plan = plan_of(model, ids, v)
    assert sum(line.operations for line in plan.lines) == plan.operations > 0
    assert sum(line.flops for line in plan.lines) == plan.flops > 0
    assert sum(line.saved for line in plan.lines) == plan.saved_bytes > 0
    assert len(plan.visits) == plan.sites
    assert plan.visits[-1].site == plan.ends


def test_a_line_says_what_it_costs_and_does(model, net, ids, v):
    plan = plan_of(model, ids, v)
    edit, sums, replaced, lens, log = plan.lines
    assert edit.where.text == "model.transformer.h[0].output[:, -1] += v"
    assert edit.does == ("edits transformer.h.0.output",)
    assert edit.made == v.nbytes
    layers = len(model.transformer.h)
    assert sums.operations == layers
    assert sums.made == sums.saved == 4 * layers
    first, last = "transformer.h.0.mlp.output", f"transformer.h.{layers - 1}.mlp.output"
    assert sums.does == (f"reads {layers} sites: {first} ... {last}", "saves 'sums'")
    assert replaced.does == ("reads transformer.h.1.output", "replaces transformer.h.2.output")
    assert replaced.made == 9 * 32 * 4
    vocabulary = net.lm_head.weight.shape[0]
    assert lens.flops == 2 * 9 * 32 * vocabulary  # a product of matrices
    assert lens.does == ("reads transformer.h.1.output", "applies lm_head", "saves 'lens'")
    assert log.does == ("reads transformer.h.0.output", "logs")


def test_sites_stand_in_firing_order(model, ids):
    with model.scan(ids) as tracer:
        model.transformer.h[2].output.save()
        model.transformer.h[0].output[:] = 0
        model.transformer.h[1].attn.output[0].save()
        model.transformer.h[1].input.save()
    visits = tracer.plan().visits
    assert [str(visit.site) for visit in visits] == [
        "transformer.h.0.output",
        "transformer.h.1.inputs",
        "transformer.h.1.attn.output",
        "transformer.h.2.output",
    ]
    assert [visit.does for visit in visits] == [("edited in place",), *[("read",)] * 3]
    assert all(visit.types == ("float32[1, 9, 32]",) for visit in visits)
    assert all(visit.bytes == 9 * 32 * 4 for visit in visits)


def test_skips_stops_and_gradients_are_said(model, ids):
    with model.scan(ids) as tracer:
        model.transformer.h[1].skip(model.transformer.h[1].input)
        model.transformer.h[2].output.sum().backward()
        model.transformer.h[0].output.grad.save("g")
        tracer.stop()
    does = [word for line in tracer.plan().lines for word in line.does]
    assert "skips transformer.h.1" in does
    assert {"goes backward", "takes a gradient", "saves 'g'", "stops the pass"} <= set(does)


def test_the_text_has_a_row_for_each_line_and_site(model, ids, v):
    plan = plan_of(model, ids, v)
    text = str(plan)
    assert text.startswith(str(plan.price))
    rows = text.splitlines()
    for line in plan.lines:
        assert sum(row.startswith(f"test_plan_html.py:{line.where.line} ") for row in rows) == 1
    for visit in plan.visits:
        assert sum(row.startswith(f"{visit.site} ") for row in rows) == 1
    assert not [row for row in rows if row != row.rstrip()]


def test_the_page_says_the_same(model, ids, v):
    plan = plan_of(model, ids, v)
    sums, lines, visits = Page(plan._repr_html_()).tables
    assert [tuple(row) for row in sums[:7]] == plan.price.rows()
    assert [row[-1] for row in lines[1:]] == [line.where.text for line in plan.lines]
    assert [row[-2] for row in lines[1:]] == ["; ".join(line.does) for line in plan.lines]
    assert [row[0] for row in visits[1:]] == [str(visit.site) for visit in plan.visits]


def test_no_name_acts_on_the_page(model, ids):
    with model.scan(ids) as tracer:
        h = model.transformer.h[0].output
        h.save("a<script>alert(1)</script>&amp;\"'")
        (h.sum() + 0 if "<b>" < "</table>" else h).save("x")
    page = Page(tracer.plan()._repr_html_())
    assert page.tags == {"div", "table", "thead", "tbody", "tr", "td", "th"}
    cells = [cell for table in page.tables for row in table for cell in row]
    assert any("<script>alert(1)</script>&amp;" in cell for cell in cells)


class Odd(torch.nn.Module):
    """Its child's name would close a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("</td><img src=x>\x1b[31m", torch.nn.Linear(3, 3))

    def forward(self, x):
        return next(self.children())(x)


def test_no_path_of_a_module_acts_on_a_page_or_a_terminal():
    from weft.graph.node import Graph, Read, Ref, Save
    from weft.graph.site import Site, Where
    from weft.run.estimate import estimate

    (path,) = [name for name, _ in Odd().named_modules() if name]
    nodes = (
        Read(site=Site(path, "output"), shape=(3,)),
        Save(name="\x1b[2J<i>", value=Ref(0)),
    )
    found = estimate(Graph(nodes, (Where("a\x1b.py", 1, "<u>"),)), lambda site: 0)
    page = Page(found._repr_html_())
    assert not page.tags & {"img", "i", "u"}
    assert "\x1b" not in found._repr_html_() + str(found)


def test_the_plan_of_a_block_that_asks_nothing(model, ids):
    with model.scan(ids) as tracer:
        pass
    plan = tracer.plan()
    assert (plan.lines, plan.visits, plan.ends) == ((), (), None)
    assert Page(plan._repr_html_()).tables == [[list(row) for row in plan.price.rows()]]
    assert str(plan) == str(plan.price)


# -- passes --------------------------------------------------------------------------------------


def chain(model, tracer):
    """The second prompt takes from the first at the same layer; the third is on its own."""
    h = model.transformer.h
    with tracer.invoke(A):
        early = h[1].output[:, -1]
    with tracer.invoke(B):
        h[1].output[:, -1] = early
        h[2].output.save()
    with tracer.invoke(C):
        h[0].output.save()


def late(model, tracer):
    """The second prompt needs an end of the first: two passes."""
    h = model.transformer.h
    with tracer.invoke(A):
        end = model.lm_head.output[:, -1, :32]
    with tracer.invoke(B):
        h[0].output[:, -1] = end
        h[2].output.save()


def circle(model, tracer):
    """Each needs an early value of the other, and one a gradient: turns."""
    h = model.transformer.h
    with tracer.invoke(A):
        first, later = h[0].output[:, -1], h[2].output
    with tracer.invoke(B):
        h[1].output[:, -1] = first
        other = h[1].output[:, 0]
    later[:, -1] = other
    later.sum().save()
    with tracer.invoke(B):
        h[1].output.sum().backward()
        h[0].output.grad.save()


@pytest.mark.parametrize(
    ("block", "options", "expected"),
    [
        (chain, {}, "0, 1 and 2 share one"),
        (chain, {"alone": True}, "0 alone; 1 alone; 2 alone"),
        (late, {}, "0 alone; 1 alone"),
        (circle, {}, "0 and 1 take turns, each with its own; 2 alone"),
    ],
)
def test_passes_are_those_that_run(model, net, block, options, expected):
    with model.trace() as tracer:
        chain(model, tracer)  # the model has its trial now
    with counted(net) as calls, model.trace(**options) as tracer:
        block(model, tracer)
        text = str(tracer.plan())
        planned = tracer.plan().forwards
    assert f"passes       {expected}\n" in text
    assert len(calls) == sum(1 if one.shared else len(one.invokes) for one in planned)


def test_passes_are_told_without_weights_and_without_a_run(gpt2, net):
    fresh = weft.LanguageModel(net)
    with counted(net) as calls, fresh.scan() as tracer:
        chain(fresh, tracer)
    signatures = len(calls)  # fake passes
    assert "0, 1 and 2 share one" in str(tracer.plan())
    tracer.plan()
    assert len(calls) - signatures <= 1  # at most a fake pass for the common size
