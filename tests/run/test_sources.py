"""Sites inside forwards: the names, the copies, and runs of them beside other people's forwards."""

from __future__ import annotations

import functools
import threading
import types
from typing import Any

import pytest
import torch
from torch import nn

from weft.errors import GraphError, OtherSourceError, SourceError
from weft.graph.check import check
from weft.graph.node import Call, Fill, Graph, Mark, Read, Ref, Save, Skip, Write
from weft.graph.site import Site
from weft.run.hooks import run
from weft.sources.listing import Listing, Operation
from weft.sources.parse import function_in, told
from weft.sources.source import source_of
from weft.sources.stand import forward_of
from weft.testing.same import bitwise

# -- names -----------------------------------------------------------------------------------------


def names_in(text: str) -> list[tuple[str, int]]:
    return [(one.name, one.line) for one in told(function_in(text))[1]]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return self.c_proj(x)", ["self_c_proj_0"]),
        ("return f(f(x))", ["f_0", "f_1"]),
        ("return self.c_attn(x).split(3)", ["split_0", "self_c_attn_0"]),
        ("return torch.nn.functional.softmax(x)", ["torch_nn_functional_softmax_0"]),
        ("return self.layers[0](x)", ["call_0"]),
        ("return self._private(x)", ["self__private_0"]),
        ("return super().forward(x)", ["forward_0"]),
        ("return [g(y) for y in x]", ["g_0"]),
        ("return (lambda y: g(y))", []),
        ("return f'{g(x)}'", ["g_0"]),
        ("return {**locals(), **vars(x)}", []),
    ],
)
def test_names_of_operations(body, expected):
    assert [name for name, _ in names_in(f"def forward(self, x):\n    {body}\n")] == expected


def test_what_a_nested_function_calls_is_its_own_business():
    text = "    def forward(self, x):\n        def inner(y):\n            return g(y)\n"
    assert names_in(f"{text}        return inner(x)\n") == [("inner_0", 3)]


def test_the_line_is_that_of_the_name():
    text = (
        "@decorated(3)\ndef forward(self, x):\n    return self.first(\n        x,\n    ).second()\n"
    )
    assert names_in(text) == [("second_0", 4), ("self_first_0", 2)]


def test_an_ending_is_enough_where_it_is_one():
    listing = Listing("", "", (Operation("a_b_0", 0, "b"), Operation("c_d_0", 0, "d")))
    assert listing.find("b_0").name == "a_b_0"
    with pytest.raises(LookupError):
        listing.find("b_1")
    two = Listing("", "", (Operation("a_b_0", 0, "b"), Operation("c_b_0", 0, "b")))
    with pytest.raises(LookupError) as caught:
        two.find("b_0")
    assert caught.value.args[0] == ["a_b_0", "c_b_0"]
    assert two.find("c_b_0").name == "c_b_0"


# -- copies ----------------------------------------------------------------------------------------


def noisy(function):
    """A decorator as there are many: it knows what it wraps by its closure."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        wrapper.seen += 1
        return function(*args, **kwargs) + 1

    wrapper.seen = 0
    return wrapper


def hidden(function):
    """One that does not: there is nothing to put a copy into."""
    wrapper: Any = lambda *args, box=[function]: box[0](*args)
    wrapper.__wrapped__ = function
    return wrapper


class Base(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


def free(number):
    class Odd(Base):
        """Everything that a copy must keep."""

        def __init__(self):
            super().__init__()
            self.__secret = 3.0

        @noisy
        def forward(self, x, *rest, scale: float = 2.0, **options) -> torch.Tensor:
            """With a docstring."""
            kept: list = [torch.sin(y) for y in (x, *rest)]
            if (doubled := torch.mul(x, scale)) is not None:
                kept.append(doubled)
            for key, value in options.items():
                kept.append(torch.add(value, len(key)))
            return super().forward(x) + sum(kept) * number + self.__secret

    return Odd()


def test_a_copy_is_the_same_function():
    net, x = free(5), torch.randn(4)
    called = []

    def hook(name, function, /, *args, **kwargs):
        called.append(name)
        return function(*args, **kwargs)

    forward = forward_of(net)
    copy = source_of(forward).copied(forward, hook)
    bitwise(copy(x, x * 2, scale=0.5, key=x), net(x, x * 2, scale=0.5, key=x))
    assert called[:2] == ["torch_sin_0", "torch_sin_0"]
    assert {"forward_0", "torch_mul_0", "torch_add_0", "kept_append_1", "sum_0"} <= set(called)
    called.clear()
    net(x)
    assert not called  # nobody else comes by the copy


def test_another_hook_gives_another_copy():
    net, x = free(5), torch.randn(4)
    forward = forward_of(net)
    source = source_of(forward)
    plain = source.copied(forward, lambda name, function, /, *a, **k: function(*a, **k))
    zero = source.copied(
        forward,
        lambda name, function, /, *a, **k: x * 0 if name == "forward_0" else function(*a, **k),
    )
    assert (plain(x) - zero(x) - torch.tanh(x)).abs().max() < 1e-5


class Hidden(nn.Module):
    @hidden
    def forward(self, x):
        return torch.tanh(x)


def test_what_has_no_source_says_why():
    made: dict[str, Any] = {}
    exec("def forward(self, x):\n    return x.tanh()\n", made)
    net = nn.Identity()
    for forward, why in (
        (types.MethodType(made["forward"], net), "cannot be read"),
        (torch.tanh, "no function of Python"),
        (functools.partial(made["forward"], net), "no function of Python"),
        (forward_of(Hidden()), "hides what it wraps"),
    ):
        with pytest.raises(SourceError, match=why):
            source_of(forward)


def test_a_file_that_has_changed_is_noticed(tmp_path, monkeypatch):
    file = tmp_path / "changing_weft_test.py"
    file.write_text("def forward(self, x):\n    return x.tanh() + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    module = importlib.import_module("changing_weft_test")
    file.write_text("def forward(self, x):\n    return x.tanh() - 1\n")
    with pytest.raises(SourceError, match="is not what was loaded"):
        source_of(module.forward)


# -- runs ------------------------------------------------------------------------------------------


def halved(x):
    return torch.tanh(x) / 2


class Layer(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return halved(self.lin(x)) + x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(n) for n in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


NET, X = Net().eval(), torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


def marks(path, *, inside=True, digest=None):
    net: Any = NET.get_submodule(path)
    found = [Mark(path=path, digest=digest or source_of(forward_of(net)).digest)]
    if inside:
        found.append(Mark(path=path, digest=source_of(halved).digest, inside=("halved_0",)))
    return tuple(found)


TANH = "source.halved_0.source.torch_tanh_0"


def by_hand(change, number=1):
    with torch.no_grad():
        x = X
        for n, layer in enumerate(NET.layers):
            tanh = torch.tanh(layer.lin(x))
            x = (change(tanh) if n == number else tanh) / 2 + x
        return x


def graph_that(*nodes, sources=None):
    return Graph(nodes=nodes, sources=marks("layers.1") if sources is None else sources)


def read(port=f"{TANH}.output", leaf=(), call=0):
    return Read(site=Site("layers.1", port, call), leaf=leaf, shape=(2, 4))


WRITE = graph_that(
    read(),
    Call(op="mul", args=(Ref(0), 3.0)),
    Write(site=Site("layers.1", f"{TANH}.output"), value=Ref(1)),
    Read(site=Site("", "output"), shape=(2, 4)),
    Save(name="end", value=Ref(3)),
)


def result(graph, x=X):
    check(graph)
    return run(graph, {}, NET, (x,)).saved


def test_a_value_inside_a_function_is_read_and_written():
    bitwise(result(WRITE)["end"], by_hand(lambda tanh: tanh * 3))
    assert not any("forward" in vars(module) for module in NET.modules())


def test_an_edit_in_place_reaches_the_functions_own_tensor():
    graph = graph_that(
        read(),
        Call(op="Tensor.mul_", args=(Ref(0), 3.0), alias=(Ref(0),), writes=(Ref(0),)),
        Fill(site=Site("layers.1", f"{TANH}.output"), value=Ref(0)),
        Read(site=Site("", "output"), shape=(2, 4)),
        Save(name="end", value=Ref(3)),
    )
    bitwise(result(graph)["end"], by_hand(lambda tanh: tanh * 3))


def test_arguments_stand_in_inputs():
    graph = graph_that(
        read("source.self_lin_0.inputs", leaf=(0, 0)),
        Skip(site=Site("layers.1", "source.self_lin_0.output"), values=(Ref(0),)),
        read(f"{TANH}.inputs", leaf=(0, 0)),
        Save(name="given", value=Ref(2)),
        Save(name="x", value=Ref(0)),
    )
    found = result(graph)
    bitwise(found["given"], found["x"])


def test_another_source_is_refused():
    other = graph_that(*WRITE.nodes, sources=marks("layers.1", digest="0" * 64))
    with pytest.raises(OtherSourceError, match=r"layers\.1\.source, which is another source here"):
        result(other)
    nested = (marks("layers.1")[0], Mark("layers.1", "0" * 64, ("halved_0",)))
    with pytest.raises(OtherSourceError, match=r"halved_0\.source, which is another"):
        result(graph_that(*WRITE.nodes, sources=nested))
    assert not any("forward" in vars(module) for module in NET.modules())
    bitwise(NET(X).detach(), by_hand(lambda tanh: tanh))


@pytest.mark.parametrize(
    ("port", "sources", "why"),
    [
        (f"{TANH}.output", (), "has no mark"),
        (f"{TANH}.output", marks("layers.1", inside=False), "has no mark"),
        (f"{TANH}.output", marks("layers.1", digest="X" * 64), "odd place or hash"),
        (f"{TANH}.output", marks("layers.1") * 2, "marked twice"),
        ("source..output", marks("layers.1"), "unknown port"),
        ("source.a.b.output", marks("layers.1"), "unknown port"),
        ("source.a b.output", marks("layers.1"), "unknown port"),
        ("source.__class__.middle", marks("layers.1"), "unknown port"),
        ("source.a.output\n", marks("layers.1"), "unknown port"),
        ("source.a." * 40 + "output", marks("layers.1"), "unknown port"),
    ],
)
def test_the_grammar_of_ports_and_marks(port, sources, why):
    graph = Graph(nodes=(read(port), Save(name="h", value=Ref(0))), sources=sources)
    with pytest.raises(GraphError, match=why):
        check(graph)


def test_what_is_skipped_is_named_by_its_output():
    site = Site("layers.1", f"{TANH}.inputs")
    with pytest.raises(GraphError, match="named by its output"):
        check(graph_that(read(), Skip(site=site, values=(Ref(0),))))


def test_an_error_of_the_experiment_leaves_nothing_behind():
    graph = graph_that(
        read(),
        Call(op="matmul", args=(Ref(0), Ref(0))),
        Save(name="h", value=Ref(1)),
    )
    with pytest.raises(RuntimeError, match="matmul"):
        result(graph)
    assert not any("forward" in vars(module) for module in NET.modules())
    bitwise(NET(X).detach(), by_hand(lambda tanh: tanh))


def test_threads_do_not_see_each_others_copies():
    """Eight threads on one module: half run graphs with other factors, half plain forwards."""
    wrong: list[Any] = []
    start = threading.Barrier(8)
    plain = by_hand(lambda tanh: tanh)

    def factor(number):
        nodes = list(WRITE.nodes)
        nodes[1] = Call(op="mul", args=(Ref(0), float(number)))
        return graph_that(*nodes)

    def work(number):
        start.wait(60)
        for turn in range(60):
            try:
                if number % 2:
                    with torch.no_grad():
                        bitwise(NET(X), plain)
                else:
                    scale = number + turn
                    expected = by_hand(lambda tanh, scale=scale: tanh * scale)
                    bitwise(result(factor(scale))["end"], expected)
            except BaseException as error:  # noqa: BLE001 (told by the test)
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not any("forward" in vars(module) for module in NET.modules())
