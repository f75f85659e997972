"""`fn=`: blocks that call another method of the model; `trace=False`: no block at all.

The oracles are the methods themselves, with plain hooks.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import weft
from tests.language.hooks import hook_count
from weft.errors import (
    GraphError,
    InputError,
    RecordingError,
    UnknownOptionError,
)
from weft.handles.language import LanguageModel
from weft.testing.same import bitwise

HERE = [False, "local"]
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Coder(nn.Module):
    """Its forward is its two methods, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 8)
        self.decoder = nn.Linear(8, 4)

    def encode(self, x, *, scale=1.0):
        return {"z": torch.relu(self.encoder(x)) * scale, "none": None}

    def decode(self, z):
        return self.decoder(z)

    def forward(self, x):
        return self.decode(self.encode(x)["z"])


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Coder().eval()


@pytest.fixture
def model(net):
    return weft.Model(net)


def encoded(net, x, change=lambda output: output, **options):
    handle = net.encoder.register_forward_hook(lambda module, args, output: change(output))
    try:
        with torch.no_grad():
            return net.encode(x, **options)["z"]
    finally:
        handle.remove()


def first_is_five(output):
    output[:, 0] = 5
    return output


# -- fn --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remote", HERE)
def test_a_method_is_read_and_edited(model, net, remote):
    with model.trace(X, fn="encode", remote=remote):
        given = model.input.save()
        model.encoder.output[:, 0] = 5
        h = model.encoder.output.save()
        z = model.output["z"].save()
    bitwise(z, encoded(net, X, first_is_five))
    bitwise(h, first_is_five(net.encoder(X).detach()))
    bitwise(given, X)
    assert hook_count(net) == 0


@pytest.mark.parametrize("remote", HERE)
def test_arguments_are_those_of_the_method(model, net, remote):
    with model.trace(X, scale=2.0, fn=net.encode, remote=remote) as tracer:
        z = tracer.result["z"].save()
    bitwise(z, encoded(net, X, scale=2.0))


def test_the_output_of_a_method_is_written(model, net):
    with model.trace(torch.ones(2, 8), fn="decode", remote=False):
        model.output = model.output * 3
        out = model.output.save()
    bitwise(out, net.decode(torch.ones(2, 8)).detach() * 3)


def test_the_forward_by_its_name_is_the_forward(model, net):
    with model.trace(X, fn="forward"):
        out = model.output.save()
    bitwise(out, net(X).detach())


def test_modules_that_a_method_does_not_call_do_not_run(model):
    with (
        pytest.raises(Exception, match="decoder"),
        model.trace(X, fn="encode", remote=False),
    ):
        model.decoder.output.save()


def test_invokes_of_a_method(model, net):
    with model.trace(fn="encode", remote=False) as tracer:
        with tracer.invoke(X[:1]):
            h = model.encoder.output
            one = model.output["z"].save()
        with tracer.invoke(X[1:2]):
            model.encoder.output[:] = h
            two = model.output["z"].save()
    bitwise([one, two], [encoded(net, X[:1])] * 2)


def test_gradients_of_a_method(model, net):
    with model.trace(X, fn="encode", remote=False):
        model.output["z"].sum().backward()
        gradient = model.encoder.output.grad.save()
    bitwise(gradient, (net.encoder(X) > 0).float())


def test_a_look_in_a_method(model, net):
    with model.trace(X, fn="encode", remote=False):
        if float(model.encoder.output.abs().sum()) > 0:
            model.encoder.output[:, 0] = 5
        z = model.output["z"].save()
    bitwise(z, encoded(net, X, first_is_five))


def test_edits_of_a_model_act_in_its_methods(model, net):
    with model.edit(X) as edited:
        model.encoder.output[:, 0] = 5
    with edited.trace(X, fn="encode", remote=False):
        z = edited.output["z"].save()
    bitwise(z, encoded(net, X, first_is_five))
    with model.trace(X, fn="encode", remote=False):
        z = model.output["z"].save()
    bitwise(z, encoded(net, X))


def test_shapes_of_a_method(model):
    with model.scan(X, fn="encode") as tracer:
        assert model.output["z"].shape == (3, 8)
        model.encoder.output.save()
    assert "encoder.output" in str(tracer.plan())


def test_the_mode_of_the_model_is_followed():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.999)

        def noise(self, x):
            return self.drop(x) if self.training else x * 2

        def forward(self, x):
            return x

    net = Noisy().eval()
    model = weft.Model(net)

    def noise():
        with model.trace(torch.ones(5, 5), fn="noise", remote=False):
            out = model.output.save()
        return out

    bitwise(noise(), torch.full((5, 5), 2.0))
    net.train()
    assert (noise() == 0).any()
    net.eval()
    bitwise(noise(), torch.full((5, 5), 2.0))


def test_a_method_of_a_language_model(gpt2):
    """Inputs are given as they are: there are no prompts and no masks."""
    net = copy.deepcopy(gpt2.net)

    class Known(type(net)):
        def embedded(self, ids):
            return self.transformer.wte(ids) + 1

    net.__class__ = Known
    model = LanguageModel(net)
    ids = torch.tensor([[3, 4]])
    with model.trace(ids, fn="embedded"):
        out = model.output.save()
        model.transformer.wte.output[:, 0] = 0
    with torch.no_grad():
        bitwise(out[:, 1], net.transformer.wte(ids)[:, 1] + 1)
    bitwise(out[:, 0], torch.ones_like(out[:, 0]))
    with (
        pytest.raises(InputError, match="has no rows that are known"),
        model.trace(fn="embedded") as tracer,
    ):
        with tracer.invoke(ids):
            pass
        with tracer.invoke():
            model.output.save()


def test_an_experiment_remembers_its_method(model, net, tmp_path):
    with model.trace(X, fn="encode", remote=False) as tracer:
        model.encoder.output[:, 0] = 5
        model.output["z"].save("z")
    tracer.graph.save(tmp_path / "graph.weft")
    kept = weft.Experiment.load(tmp_path / "graph.weft")
    assert str(kept).startswith("a call of encode")
    other = X * 2
    bitwise(kept.run(model, other, remote=False)["z"], encoded(net, other, first_is_five))
    with model.trace(X) as tracer:
        model.output.save("out")
    assert kept.hash != tracer.graph.hash
    bitwise(tracer.graph.run(model, other)["out"], net(other).detach())


def test_an_experiment_of_a_method_that_is_not_there(net, tmp_path):
    model = weft.Model(net)
    with model.trace(X, fn="encode", remote=False) as tracer:
        model.output["z"].save("z")
    other = weft.Model(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(UnknownOptionError, match="no method that Sequential defines"):
        tracer.graph.run(other, X)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["encod", "to", "_call_impl", "encoder", "encode.__func__", ""])
def test_what_is_no_method_is_refused(model, wrong):
    with pytest.raises(UnknownOptionError, match="no method that Coder defines") as caught:
        model.trace(X, fn=wrong)
    assert "decode, encode" in caught.value.message and "fn=wrong" in str(caught.value.line)


@pytest.mark.parametrize("wrong", [3, len, lambda x: x, X.sum, nn.Linear(2, 2).forward])
def test_what_is_none_of_the_models_own_is_refused(model, wrong):
    with pytest.raises(UnknownOptionError, match="a method of the model, or its name"):
        model.trace(X, fn=wrong)


def test_the_nearest_method_is_named(model):
    with pytest.raises(UnknownOptionError) as caught:
        model.trace(X, fn="encod")
    assert "'encode'" in str(caught.value.fix)


def test_a_server_runs_no_method(model, monkeypatch):
    monkeypatch.setenv("WEFT_HOST", "http://127.0.0.1:9")
    for remote in (True, "http://127.0.0.1:9"):
        with pytest.raises(UnknownOptionError, match="and no other method") as caught:
            model.trace(X, fn="encode", remote=remote)
        assert "remote=False" in str(caught.value.fix)
    with model.trace(X, fn="encode", remote="auto") as tracer:
        model.output["z"].save()
    assert tracer.where == "here"


def test_a_graph_of_a_method_is_no_graph_of_the_forward(model, net):
    """Whoever sends it: where another call would run, it is refused."""
    from weft.engine.admit import admit
    from weft.handles.experiment import LIMITS

    with model.trace(X, fn="encode", remote=False) as tracer:
        model.encoder.output.save()
    call = model._prepare((X,), {})
    with pytest.raises(GraphError, match="a call of 'encode', and what runs here is a forward"):
        admit(tracer.graph.graph, call, model._known(), LIMITS)


def test_the_model_itself_is_not_called_in_a_block_of_a_method(model):
    with (
        pytest.raises(RecordingError, match="the model itself was called"),
        model.trace(X, fn="encode", remote=False),
    ):
        model(model.encoder.output)


def test_no_sources_in_a_block_of_a_method(model):
    with (
        pytest.raises(RecordingError, match="no sites of a call of 'encode'"),
        model.trace(X, fn="encode", remote=False),
    ):
        model.encoder.source.F_linear_0.output.save()


@pytest.mark.parametrize(
    ("opened", "name"),
    [
        (lambda model: model.sweep(X, lambda tracer, n: 0, n=range(2), fn="encode"), "fn"),
        (lambda model: model.scan(X, trace=False), "trace"),
        (lambda model: model.edit(X, fn="encode"), "fn"),
    ],
)
def test_elsewhere_these_options_mean_nothing(model, opened, name):
    with pytest.raises(UnknownOptionError, match=f"^{name} "):
        opened(model)


def test_an_invoke_has_no_method_of_its_own(model):
    with (
        pytest.raises(UnknownOptionError, match="fn is an option of the whole block"),
        model.trace() as tracer,
    ):
        tracer.invoke(X, fn="encode")


# -- trace=False -----------------------------------------------------------------------------------


def test_without_a_block_the_result_comes(model, net):
    found = model.trace(X, trace=False)
    assert type(found) is torch.Tensor
    bitwise(found, net(X).detach())


def test_without_a_block_a_language_model_gives_its_fields(gpt2):
    found = gpt2.model.trace(gpt2.ids, trace=False)
    bitwise([found.logits, found["logits"], found[0]], [gpt2.baseline] * 3)


def test_without_a_block_a_method_gives_its_result(model, net):
    found = model.trace(X, fn="encode", trace=False, remote=False)
    assert list(found) == ["z", "none"] and found["none"] is None
    bitwise(found["z"], encoded(net, X))


def test_without_a_block_edits_act(model, net):
    with model.edit(X) as edited:
        model.decoder.output[:] *= 2
    bitwise(edited.trace(X, trace=False), net(X).detach() * 2)


def test_without_a_block_the_ids_come(gpt2):
    options = {"max_new_tokens": 3, "do_sample": False}
    with gpt2.model.generate(gpt2.ids, **options) as tracer:
        ids = tracer.result.save()
    bitwise(gpt2.model.generate(gpt2.ids, **options, trace=False), ids)


def test_without_a_block_there_is_nothing_to_wait_for(model, gpt2):
    for opened in (
        lambda: model.trace(X, trace=False, blocking=False),
        lambda: gpt2.model.generate(gpt2.ids, trace=False, blocking=False),
        lambda: model.trace(X, trace=1),
        lambda: gpt2.model.generate(gpt2.ids, trace="no"),
    ):
        with pytest.raises(UnknownOptionError) as caught:
            opened()
        assert caught.value.line and caught.value.fix


def test_without_an_input_it_says_so(gpt2):
    with pytest.raises(InputError):
        gpt2.model.trace(trace=False)


def test_a_method_in_a_session(model, net):
    with model.session(remote=False):
        with model.trace(X, fn="encode"):
            z = model.output["z"]
        with model.trace(z * 2, fn="decode"):
            out = model.output.save()
    bitwise(out, net.decode(encoded(net, X) * 2).detach())
