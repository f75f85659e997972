"""A graph is a thing to keep: text, hash, file, and runs on other inputs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

import weft
from tests.language.hooks import with_hooks
from weft.errors import GraphError
from weft.testing.same import bitwise, moves

GOLDEN = Path(__file__).parent.parent / "golden"


def steer(model, ids, v, **options):
    """The experiment of this file: steer layer 1, keep layer 2 and the best token."""
    with model.trace(ids, **options) as tracer:
        model.transformer.h[1].output[:, -1] += v
        model.transformer.h[2].output.save("h")
        model.lm_head.output[:, -1].argmax(-1).save("best")
    return tracer


def by_hand(net, ids, v):
    def edit(h):
        h[:, -1] += v

    seen = with_hooks(net, {"transformer.h.1.output": edit, "transformer.h.2.output": None}, ids)
    return {"h": seen["transformer.h.2.output"], "best": seen.result.logits[:, -1].argmax(-1)}


# Text and hash


def test_the_text_has_a_line_for_each_node_with_the_users_line(model, ids, v):
    text = str(steer(model, ids, v).graph)
    assert "read transformer.h.1.output" in text
    assert "float32[1, 9, 32]" in text
    assert "Tensor.__getitem__(%0, (:, -1))" in text
    assert "fill transformer.h.1.output with %0" in text
    assert "save 'best'" in text
    assert "# test_graph.py:" in text


def test_what_nothing_needs_is_not_in_the_graph(model, ids):
    with model.trace(ids) as tracer:
        for layer in model.transformer.h:
            layer.output * 2
        model.lm_head.output.save()
    assert len(tracer.graph) == 2


def test_the_hash_stays_when_the_lines_move(model, ids, v):
    one = steer(model, ids, v).graph

    with model.trace(ids) as tracer:
        layer = model.transformer.h[1]

        layer.output[:, -1] += v

        model.transformer.h[2].output.save("h")
        model.lm_head.output[:, -1].argmax(-1).save("best")
    assert tracer.graph.hash == one.hash
    assert str(tracer.graph) != str(one)


@torch.no_grad()
def test_the_hash_differs_where_the_meaning_does(model, ids, v):
    def other_site():
        with model.trace(ids) as tracer:
            model.transformer.h[0].output[:, -1] += v
            model.transformer.h[2].output.save("h")
            model.lm_head.output[:, -1].argmax(-1).save("best")
        return tracer

    def other_number():
        with model.trace(ids) as tracer:
            model.transformer.h[1].output[:, -2] += v
            model.transformer.h[2].output.save("h")
            model.lm_head.output[:, -1].argmax(-1).save("best")
        return tracer

    tracers = [
        steer(model, ids, v),
        steer(model, ids, v + 1),
        steer(model, ids, v.double()),
        steer(model, ids, v, seed=1),
        other_site(),
        other_number(),
    ]
    assert len({tracer.graph.hash for tracer in tracers}) == len(tracers)
    assert steer(model, ids, v).graph.hash == tracers[0].graph.hash


# Running again


def test_a_graph_runs_again_on_the_same_and_on_another_input(model, net, ids, v):
    graph = steer(model, ids, v).graph
    for other in (ids, torch.flip(ids, [1])):
        bitwise(graph.run(model, other), by_hand(net, other, v))


def test_a_graph_without_sizes_runs_at_other_lengths_and_batches(model, net, ids, v):
    graph = steer(model, ids, v).graph
    longer = torch.cat([ids, torch.flip(ids, [1])], 1)
    more = torch.cat([ids, torch.flip(ids, [1])], 0)
    for other in (longer, more, ids[:, :2]):
        bitwise(graph.run(model, other), by_hand(net, other, v))


def test_a_graph_runs_on_another_copy_of_the_model(place, gpt2, model, ids, v):
    from tests.families import zoo

    graph = steer(model, ids, v).graph
    net = zoo.build("gpt2", seed=5)
    got = graph.run(place.language(net), ids)
    bitwise(got, by_hand(net, ids, v))
    moves(got["h"], by_hand(gpt2.net, ids, v)["h"])


SIZES = {
    "an item": lambda h: h[:, h.shape[1] - 1],
    "size(1)": lambda h: h[:, h.size(1) - 1],
    "unpacked": lambda h: h.view(next(iter(h.shape)), -1)[:, -32:],
    "len": lambda h: h.mT[:, :, : len(h.transpose(0, 1)) - 1],
    "numel": lambda h: h[:, : h.numel() // 32 - 1],
    "iteration": lambda h: torch.stack(list(h.transpose(0, 1))),
    "compared": lambda h: h[:, :2] if h.shape == (1, 9, 32) else h,
}


@pytest.mark.parametrize("name", SIZES)
def test_a_graph_that_read_a_size_refuses_another_naming_the_line(model, net, ids, name):
    with model.trace(ids) as tracer:
        SIZES[name](model.transformer.h[1].mlp.output).save("part")  # the size
    graph = tracer.graph
    other = torch.flip(ids, [1])
    key = "transformer.h.1.mlp.output"
    bitwise(graph.run(model, other)["part"], SIZES[name](with_hooks(net, {key: None}, other)[key]))
    with pytest.raises(GraphError) as caught:
        graph.run(model, torch.cat([ids, ids], 1))
    assert "9" in caught.value.message and "18" in caught.value.message
    # the line is in the lambda or here, both in this file
    assert __file__ in str(caught.value.line)


def test_a_shape_that_is_only_handed_on_binds_nothing(model, net, ids):
    with model.trace(ids) as tracer:
        h = model.transformer.h[1].output
        (torch.ones(h.shape) + torch.zeros(h.size()) + h.view(h.shape)).save("sum")
    longer = torch.cat([ids, ids], 1)
    key = "transformer.h.1.output"
    bitwise(tracer.graph.run(model, longer)["sum"], 1 + with_hooks(net, {key: None}, longer)[key])


def test_a_graph_that_only_writes_to_another_model_is_refused_before_it_runs(model, ids, llama):
    with model.trace(ids) as tracer:
        model.transformer.h[0].output = torch.zeros(1, 9, 32)
        model.lm_head.output.save()
    with pytest.raises(GraphError, match=r"no 'transformer\.h\.0'"):
        tracer.graph.run(llama.model, ids)


def test_a_graph_for_another_model_is_refused(model, ids, v, llama):
    with pytest.raises(GraphError, match="another model"):
        steer(model, ids, v).graph.run(llama.model, llama.ids)


def test_inside_its_block_a_graph_is_the_one_so_far(model, ids, v):
    with model.trace(ids) as tracer:
        model.transformer.h[1].output.save("h")
        early = tracer.graph
        model.lm_head.output.save("logits")
    assert list(early.run(model, ids)) == ["h"]
    assert list(tracer.graph.run(model, ids)) == ["h", "logits"]


# Files


def test_a_graph_is_saved_with_its_constants_and_loaded(model, net, ids, v, tmp_path):
    graph = steer(model, ids, v).graph
    graph.save(tmp_path / "steer.weft")
    again = weft.Experiment.load(tmp_path / "steer.weft")
    assert again.hash == graph.hash
    assert str(again) == str(graph)
    bitwise(again.run(model, ids), by_hand(net, ids, v))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float64, torch.bool, torch.int8, torch.complex64]
)
def test_constants_of_every_dtype_survive_the_file(model, ids, tmp_path, dtype):
    constant = (torch.arange(32) % 3).to(dtype)
    with model.trace(ids) as tracer:
        (model.transformer.h[1].output * constant).save("product")
    tracer.graph.save(tmp_path / "x.weft")
    got = weft.Experiment.load(tmp_path / "x.weft").run(model, ids)
    bitwise(got, tracer.results)


def test_a_loaded_graph_checks_its_guards_and_sizes(model, ids, tmp_path):
    with model.trace(ids) as tracer:
        h = model.transformer.h[1].output
        if h.sum() > -1e9:
            h[:, : h.shape[1] - 1].save("h")
    tracer.graph.save(tmp_path / "x.weft")
    again = weft.Experiment.load(tmp_path / "x.weft")
    assert again.run(model, ids)
    with pytest.raises(GraphError):
        again.run(model, torch.cat([ids, ids], 1))


def test_a_golden_file_keeps_decoding(model, net, ids):
    """Written by version 0.1; what it means must never change."""
    graph = weft.Experiment.load(GOLDEN / "steer-1.weft")
    v = torch.linspace(-2, 2, 32)
    bitwise(graph.run(model, ids), by_hand(net, ids, v))
    hash = (GOLDEN / "steer-1.sha256").read_text().strip()
    assert graph.hash == hash == steer(model, ids, v).graph.hash


# Hostile files


def header(data):
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def packed(head, tail):
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + tail


@pytest.fixture
def golden():
    return (GOLDEN / "steer-1.weft").read_bytes()


def load(tmp_path, data):
    path = tmp_path / "hostile.weft"
    path.write_bytes(data)
    return weft.Experiment.load(path)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was opened')",)


BYTES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:100],
    "without its end": lambda data: data[:-1],
    "a pickle": lambda data: pickle.dumps(Bomb()),
    "a huge header": lambda data: (2**63).to_bytes(8, "little") + data[8:],
    "no JSON": lambda data: data[:8] + b"!" * (len(data) - 8),
    "text": lambda data: b"just a text, long enough to have a length in it",
    "other metadata": lambda data: packed({"__metadata__": {"format": "pt"}}, b""),
    "no metadata": lambda data: packed({}, b""),
    "metadata that is a list": lambda data: packed({"__metadata__": []}, b""),
}


@pytest.mark.parametrize("name", BYTES)
def test_what_is_no_graph_file_is_refused(tmp_path, golden, name):
    with pytest.raises(GraphError):
        load(tmp_path, BYTES[name](golden))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(GraphError, match="cannot be read"):
        weft.Experiment.load(tmp_path / "nothing.weft")


def first(graph, kind):
    return next(node for node in graph["nodes"] if node["kind"] == kind)


def _op(graph, name):
    first(graph, "call")["op"] = name


GRAPHS = {
    "an operation that does not exist": lambda g: _op(g, "os.system"),
    "an operation outside the table": lambda g: _op(g, "Tensor.data_ptr"),
    "a dunder": lambda g: _op(g, "Tensor.__class__"),
    "as_strided": lambda g: _op(g, "as_strided"),
    "torch.load": lambda g: _op(g, "load"),
    "no nodes": lambda g: g.pop("nodes"),
    "an unknown node": lambda g: g["nodes"].append({"kind": "exec", "code": "1"}),
    "a reference to itself": lambda g: g["nodes"].append(
        {"kind": "save", "name": "x", "value": ["ref", len(g["nodes"]), 0]}
    ),
    "two saves of one name": lambda g: g["nodes"].append(dict(first(g, "save"))),
    "an unknown port": lambda g: first(g, "read")["site"].update(port="__dict__"),
    "a dunder leaf": lambda g: first(g, "read").update(leaf=["__class__"]),
    "an unknown dtype": lambda g: first(g, "read").update(dtype="object"),
    "a shape below zero": lambda g: first(g, "read").update(shape=[-1]),
    "a later version": lambda g: g.update(version=999),
    "a constant of another shape": lambda g: first(g, "const").update(shape=[5]),
    "a constant that is not there": lambda g: first(g, "const").update(key="c7"),
    "a path that is a number": lambda g: first(g, "read")["site"].update(path=3),
    "arguments nested too deep": lambda g: first(g, "call").update(args=[_nested(100)]),
}


def _nested(depth):
    arg = 1
    for _ in range(depth):
        arg = ["seq", "list", [arg]]
    return arg


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_breaks_the_grammar_is_refused(tmp_path, golden, name):
    head, tail = header(golden)
    graph = json.loads(head["__metadata__"]["graph"])
    GRAPHS[name](graph)
    head["__metadata__"]["graph"] = json.dumps(graph)
    with pytest.raises(GraphError):
        load(tmp_path, packed(head, tail))


def test_the_unchanged_graph_is_accepted(tmp_path, golden):
    """So that the refusals above are for what was changed."""
    head, tail = header(golden)
    head["__metadata__"]["graph"] = json.dumps(json.loads(head["__metadata__"]["graph"]))
    assert load(tmp_path, packed(head, tail)).hash


def test_a_deeply_nested_graph_is_refused(tmp_path, golden):
    head, tail = header(golden)
    head["__metadata__"]["graph"] = '{"nodes":' + "[" * 100_000
    with pytest.raises(GraphError):
        load(tmp_path, packed(head, tail))


def test_what_it_brings_back_is_what_its_block_did(model, net, ids, tmp_path):
    """A list that grew after it was saved, one in a tuple, and what a stop has left out."""
    hidden = {f"transformer.h.{number}.output": None for number in range(3)}
    with model.trace(ids) as tracer:
        grown, inner = weft.save([model.transformer.h[0].output], name="grown"), []
        weft.save((inner, model.transformer.h[0].output[:, 0]), name="pair")
        inner.append(model.transformer.h[0].output[:, -1])
        grown.append(model.transformer.h[1].output)
        tracer.stop()
        grown.append(model.transformer.h[2].output)
        model.transformer.h[2].output.save("late")
    tracer.graph.save(tmp_path / "kept.weft")
    other = ids.flip(1)
    found = weft.Experiment.load(tmp_path / "kept.weft").run(model, other)
    zero, one, _ = with_hooks(net, hidden, other).values()
    assert list(found) == ["grown", "pair", "pair+"]
    bitwise(found["grown"], [zero, one])
    bitwise(found["pair"], ([], zero[:, 0]))  # the graph does not say where in it the list stands
    bitwise(found["pair+"], [zero[:, -1]])
    assert len(tracer.results["grown"]) == 2 and "late" not in tracer.results
