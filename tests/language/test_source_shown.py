"""How sources are printed, and what is refused with which words."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import weft
from tests.language import sources
from tests.language.sources import (
    IDS,
    attention_of,
    eager,
)
from weft.errors import (
    NotReachedError,
    OtherSourceError,
    OutsideTraceError,
    RecordingError,
    SourceError,
    UnknownPathError,
)
from weft.testing.same import bounded


@pytest.fixture
def opened(place):
    """Gives a handle on a model, in the place where this test runs."""
    return lambda net: sources.opened(place, net)


@pytest.fixture
def gpt2():
    return eager("gpt2")


# -- what is shown, and what is refused ------------------------------------------------------------


def test_a_source_is_printed(gpt2, opened):
    model = opened(gpt2)
    text = str(model.transformer.h[0].mlp.source)
    rows = [line.split("->") for line in text.splitlines() if "->" in line and "def" not in line]
    names = [row[0].strip() for row in rows]
    assert names == ["self_c_fc_0", "self_act_0", "self_c_proj_0", "self_dropout_0"]
    assert rows[0][1].split(maxsplit=1)[1] == "hidden_states = self.c_fc(hidden_states)"
    assert tuple(names) == model.transformer.h[0].mlp.source.names
    chained = str(model.transformer.h[0].attn.source)
    assert "split_1 ->" in chained
    assert "self_c_attn_1 ->    +" in chained
    shown = repr(model.transformer.h[0].mlp.source.self_act_0)
    assert "self_act_0 ->" in shown
    assert "self_c_proj_0" not in shown


def test_the_function_called_inside_is_printed(gpt2, opened):
    model = opened(gpt2)
    with model.trace(IDS):
        source = attention_of(model, "gpt2").source
        attention_of(model, "gpt2").output[1].save()
    assert "def eager_attention_forward" in str(source)
    assert "nn_functional_softmax_0" in source.names


def test_outside_of_a_block(gpt2, opened):
    model = opened(gpt2)
    operation = model.transformer.h[0].mlp.source.self_act_0
    with pytest.raises(OutsideTraceError, match=r"self_act_0\.output was used in no block"):
        _ = operation.output


def test_an_unknown_operation_names_the_nearest(gpt2, opened):
    model = opened(gpt2)
    with pytest.raises(UnknownPathError, match="no operation 'self_c_porj_0'") as caught:
        _ = model.transformer.h[0].mlp.source.self_c_porj_0
    assert "self_c_proj_0" in str(caught.value.fix)
    assert "test_source_shown.py" in str(caught.value)


def test_an_end_that_several_have_is_refused(gpt2, opened):
    model = opened(gpt2)
    with pytest.raises(UnknownPathError) as caught:
        _ = model.transformer.h[0].attn.source.view_0
    assert "key_states_view_0" in str(caught.value.fix)


def test_an_operation_that_does_not_run(gpt2, opened):
    model = opened(gpt2)
    with pytest.raises(NotReachedError, match="self_q_attn_0 is never called"), model.trace(IDS):
        model.transformer.h[0].attn.source.self_q_attn_0.output.save()


def test_what_has_no_source_says_why(gpt2, opened):
    model = opened(gpt2)
    attention = model.transformer.h[0].attn.source
    with model.trace(IDS):
        with pytest.raises(SourceError, match="that module's own source"):
            _ = attention.self_c_proj_0.source
        with pytest.raises(SourceError, match="no function of Python"):
            _ = attention.contiguous_0.source
        with pytest.raises(SourceError, match="not a part of the model's own code"):
            _ = attention.attention_interface_0.source.nn_functional_dropout_0.source
        attention.contiguous_0.output.save()


def test_texts_and_configurations_cannot_be_read(gpt2, opened):
    model = opened(gpt2)
    with model.trace(IDS):
        args, _ = model.transformer.h[0].attn.source.ALL_ATTENTION_FUNCTIONS_get_interface_0.inputs
        assert "eager" not in repr(args[0])
        model.transformer.h[0].output.save()


def test_a_graph_says_its_sources(gpt2, opened):
    model = opened(gpt2)
    with model.trace(IDS) as tracer:
        attention_of(model, "gpt2").source.softmax_0.output.save()
    marks = {(mark.path, mark.inside): mark.digest for mark in tracer.graph.graph.sources}
    source = model.transformer.h[1].attn.source
    assert marks == {
        ("transformer.h.1.attn", ()): source.digest,
        ("transformer.h.1.attn", ("attention_interface_0",)): (
            source.attention_interface_0.source.digest
        ),
    }
    with model.trace(IDS) as tracer:
        model.transformer.h[1].output.save()
    assert tracer.graph.graph.sources == ()


def test_an_operation_that_does_not_run_tells_of_its_namesakes(gpt2, opened):
    model = opened(gpt2)
    with pytest.raises(NotReachedError) as caught, model.trace(IDS):
        model.transformer.h[0].attn.source.self_c_attn_0.output.save()
    assert "self_c_attn_1 runs" in str(caught.value.fix)


def test_what_is_called_is_printed_outside_of_a_block(gpt2, opened):
    gpt2 = copy.deepcopy(gpt2)
    source = attention_of(opened(gpt2), "gpt2").source
    assert "nn_functional_softmax_0" in source.names
    assert "def eager_attention_forward" in str(source)


def test_an_assignment_to_what_is_no_site_is_refused(gpt2, opened):
    model = opened(gpt2)
    mlp = model.transformer.h[0].mlp
    with model.trace(IDS):
        with pytest.raises(AttributeError, match=r"assign to its \.output"):
            mlp.source.self_act_0 = mlp.output
        with pytest.raises(UnknownPathError, match="no operation 'self_akt_0'"):
            mlp.source.self_akt_0 = mlp.output
        with pytest.raises(AttributeError, match="no site 'outptu'"):
            mlp.source.self_act_0.outptu = mlp.output
        mlp.output.save()


class Here(nn.Module):
    def forward(self, x):
        return torch.tanh(x) + x


class There(nn.Module):
    def forward(self, x):
        return torch.tanh(x) - x


def test_another_source_is_refused():
    """The graph of one model is not run on another one, in which the names mean other lines."""
    x = torch.ones(2, 4)
    model, other = [weft.Model(nn.Sequential(one)) for one in (Here(), There())]
    with model.trace(x) as tracer:
        model[0].source.torch_tanh_0.output.save(name="h")
    bounded(tracer.graph.run(model, x)["h"], torch.tanh(x))
    with pytest.raises(OtherSourceError, match=r"0\.source, which is another") as caught:
        tracer.graph.run(other, x)
    assert "test_source_shown.py" in str(caught.value)


def test_the_runs_of_one_call_have_no_numbers_of_their_own(gpt2, opened):
    model = opened(gpt2)
    with model.trace(IDS):
        with pytest.raises(RecordingError, match="not counted by its calls"):
            _ = model.transformer.h[0].mlp.calls[0].source
        model.output.logits.save()
