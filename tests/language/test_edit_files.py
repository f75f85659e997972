"""Edits in files: saved, loaded, refused for another model, and never believed."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from torch import nn

import weft
from tests.families import zoo
from tests.language.hooks import with_hooks
from weft.errors import EditError, GraphError, UnknownPathError, WeftError
from weft.graph.node import Call, Const, Fill, Graph, Log, Read, Ref, Save, Write
from weft.graph.site import Site, Where
from weft.handles.language import LanguageModel
from weft.kernels.frames import to_frame
from weft.testing.same import bitwise
from weft.wire.codec import decode_edits, encode, encode_edits

H1, MLP2 = "transformer.h.1.output", "transformer.h.2.mlp.output"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "edits.weft"


@pytest.fixture
def edited(model, v):
    """A handle with two edits: a fill, and a parameter's."""
    scale = torch.full((32,), 0.5, requires_grad=True)
    with model.edit() as one:
        model.transformer.h[1].output[:, -1] += v
    with one.edit() as two:
        h = model.transformer.h[1].output
        h += torch.randn_like(h) * 0
        model.transformer.h[2].mlp.output = model.transformer.h[2].mlp.output * scale
        noise = torch.randn_like(h) * 0
        h += noise
    return two


def hooks(v):
    def edit(h):
        h[:, -1] += v

    return {H1: edit, MLP2: lambda h: h * 0.5}


def logits_of(model, ids):
    with model.trace(ids):
        logits = model.output.logits.save()
    return logits


def test_what_was_saved_is_loaded(model, net, edited, ids, v, path):
    edited.save_edits(path)
    plain = with_hooks(net, {}, ids).result.logits
    loaded = model.load_edits(path)
    for other in (ids, torch.cat([ids, ids.flip(1)], 0), ids[:, :3]):
        bitwise(logits_of(loaded, other), with_hooks(net, hooks(v), other).result.logits)
    bitwise(logits_of(model, ids), plain)
    loaded.clear_edits()
    bitwise(logits_of(loaded, ids), plain)


def test_loading_adds_to_what_is_there(model, net, edited, ids, v, path):
    edited.save_edits(path)
    with model.edit() as half:
        model.transformer.h[1].output *= 0.5
    both = half.load_edits(path)

    def half_then(h):
        h *= 0.5
        h[:, -1] += v

    expected = with_hooks(net, {**hooks(v), H1: half_then}, ids).result.logits
    bitwise(logits_of(both, ids), expected)
    assert half.load_edits(path, inplace=True) is half
    bitwise(logits_of(half, ids), expected)
    both.save_edits(path)
    bitwise(logits_of(model.load_edits(path), ids), expected)  # and again, in one file


def test_on_another_copy_of_the_model(net, edited, ids, v, path):
    """In this process, wherever the file is from; of other weights."""
    edited.save_edits(path)
    twin = zoo.build("gpt2", seed=1)
    loaded = LanguageModel(twin).load_edits(path)
    bitwise(logits_of(loaded, ids), with_hooks(twin, hooks(v), ids).result.logits)


def test_any_module(path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model, x = weft.Model(net), torch.randn(5, 4)
    with model.edit(x) as edited:
        model[0].output[:, 0] = 1
    edited.save_edits(path)

    def one(h):
        h[:, 0] = 1

    with model.load_edits(path, x[:2]).trace(x):
        out = model.output.save()
    bitwise(out, with_hooks(net, {"0.output": one}, x).result)


def test_an_error_names_the_line_that_stands_in_the_file(model, ids, path):
    with model.edit() as edited:
        model.transformer.h[1].output[:, 7] = 0
    edited.save_edits(path)
    with pytest.raises(EditError, match="out of bounds") as caught:
        model.load_edits(path).trace(ids[:, :5]).__enter__()
    assert "model.transformer.h[1].output[:, 7] = 0" in str(caught.value.line)


def test_nothing_to_save(model, path):
    with pytest.raises(EditError, match="no edits to save"):
        model.save_edits(path)
    assert not path.exists()


def test_another_model_refuses_them(edited, path):
    edited.save_edits(path)
    for name in ("gpt_neox", "llama"):
        with pytest.raises(EditError, match="for another model"):
            weft.LanguageModel(zoo.build(name)).load_edits(path)


def test_what_is_no_file_of_edits(model, ids, path):
    with pytest.raises(GraphError, match="cannot be read"):
        model.load_edits(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(GraphError, match="not a graph file"):
        model.load_edits(path)
    with model.trace(ids) as tracer:
        model.lm_head.output.save()
    tracer.graph.save(path)
    with pytest.raises(GraphError, match="has no edits of a model"):
        model.load_edits(path)


# -- a stranger's ----------------------------------------------------------------------------------

SITE = Site("transformer.h.1", "output")
READ = Read(site=SITE, shape=(8, 63, 32))


def read(path="transformer.h.1", shape=(8, 63, 32)):
    return Read(site=Site(path, "output"), shape=shape)


HOSTILE = {
    "a save": (READ, Write(site=SITE, value=Ref(0)), Save(name="x", value=Ref(0))),
    "a log": (READ, Write(site=SITE, value=Ref(0)), Log(parts=("x",))),
    "nothing": (READ,),
    "another step": (READ, Write(site=replace(SITE, step=1), value=Ref(0))),
    "another invoke": (READ, Write(site=replace(SITE, invoke=1), value=Ref(0))),
    "a module that is not there": (read("os.system"), Write(site=SITE, value=Ref(0))),
    "another shape": (READ, Call(op="Tensor.__getitem__", args=(Ref(0), 0)),
                      Write(site=SITE, value=Ref(1))),
    "an operation that is none": (
        READ, Call(op="os.system", args=("ls",)), Write(site=SITE, value=Ref(1))),
    "a dunder": (
        READ, Call(op="Tensor.__class__.__get__", args=(Ref(0),)),
        Write(site=SITE, value=Ref(1))),
    "a keyword that reaches out": (
        READ, Call(op="mul", args=(Ref(0), 2), kwargs=(("out", Ref(0)),)),
        Write(site=SITE, value=Ref(1))),
    "what depends on numbers": (
        READ, Call(op="nonzero", args=(Ref(0),)), Write(site=SITE, value=Ref(1))),
    "a write into a constant": (
        Const(key="c0", shape=(2,), dtype="float32"), READ,
        Call(op="Tensor.add_", args=(Ref(0), 1), alias=(Ref(0),), writes=(Ref(0),)),
        Write(site=SITE, value=Ref(1))),
    "a split into millions": (
        READ, Call(op="tensor_split", args=(Ref(0), 60_000_000), outs=2),
        Write(site=SITE, value=Ref(1))),
}  # fmt: skip

SAYS = {
    "a save": "nothing can be saved",
    "a log": "logs nothing",
    "nothing": "holds no edits",
    "another step": "about every input and step",
    "another invoke": "about every input and step",
    "a module that is not there": "no module 'os.system'",
    "another shape": "float32[63, 32] is written",
    "an operation that is none": "no operation 'os.system'",
    "a dunder": "no operation 'Tensor.__class__.__get__'",
    "a keyword that reaches out": "out= cannot be given",
    "what depends on numbers": "depends on numbers",
    "a write into a constant": "a tensor of yours",
    "a split into millions": "60000000 steps",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_strangers_file_is_refused_before_anything_is_done(model, ids, path, name):
    nodes = HOSTILE[name]
    frames = {"c0": to_frame(torch.zeros(2))} if isinstance(nodes[0], Const) else {}
    graph = Graph(nodes=nodes, where=(Where("stranger.py", 3, "h += 1"),))
    path.write_bytes(encode_edits(graph, frames, model._places.wanted().fingerprint))
    with pytest.raises(WeftError) as caught:
        model.load_edits(path, inplace=True)
    assert SAYS[name] in caught.value.message
    assert not model._edits


def test_a_fill_without_an_operation_does_nothing(model, net, ids, path):
    """The grammar allows it; it means what it says."""
    graph = Graph(nodes=(READ, Fill(site=SITE, value=Ref(0))))
    path.write_bytes(encode_edits(graph, {}, model._places.wanted().fingerprint))
    loaded = model.load_edits(path)
    bitwise(logits_of(loaded, ids), with_hooks(net, {}, ids).result.logits)


def test_what_nothing_needs_is_not_even_looked_at(model, path):
    split = Call(op="tensor_split", args=(Ref(0), 60_000_000))
    unused = Const(key="c0", shape=(2,), dtype="float32")
    graph = Graph(nodes=(READ, split, unused, Write(site=SITE, value=Ref(0))))
    frames = {"c0": to_frame(torch.zeros(2))}
    path.write_bytes(encode_edits(graph, frames, model._places.wanted().fingerprint))
    (edit,) = model.load_edits(path)._edits
    assert len(edit) == 2
    assert not edit.constants


def test_a_graph_file_names_no_model_and_a_broken_one_is_not_read(model, edited, path):
    edited.save_edits(path)
    data = path.read_bytes()
    graph, frames, fingerprint = decode_edits(data)
    with pytest.raises(GraphError, match="has no edits of a model"):
        decode_edits(encode(graph, frames))
    for cut in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(GraphError):
            model.load_edits(path)
    odd = replace(graph, nodes=graph.nodes[::-1])
    path.write_bytes(encode_edits(odd, frames, fingerprint))
    with pytest.raises(GraphError):
        model.load_edits(path)


GOLDEN = Path(__file__).parent.parent / "golden" / "edits-1.weft"


def test_the_golden_file_is_still_read(path):
    """Edits that an earlier Weft has written: halves of what `0` gives, plus a constant."""
    graph, frames, _ = decode_edits(GOLDEN.read_bytes())
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model, x = weft.Model(net), torch.ones(3, 2)
    # the fingerprint knows the source code of the modules, which is that of this PyTorch
    path.write_bytes(encode_edits(graph, frames, model._places.wanted().fingerprint))
    with model.load_edits(path, x).trace(x):
        out = model.output.save()
    made = {"0.output": lambda h: h * 0.5 + torch.tensor([1.0, 2.0])}
    bitwise(out, with_hooks(net, made, x).result)


def test_a_path_of_the_model_is_named(model, path):
    graph = Graph(nodes=(read("transformer.h.1.mpl"), Write(site=SITE, value=Ref(0))))
    path.write_bytes(encode_edits(graph, {}, model._places.wanted().fingerprint))
    with pytest.raises(UnknownPathError, match="mpl"):
        model.load_edits(path)
