"""Several inputs in one block: inside each invoke all is as it is when the input runs alone.

Oracles: plain hooks on the prompt alone, and the same lines in a block of the prompt alone. With
`alone=True` every invoke has a forward of its own, so those comparisons are bitwise; where invokes
share a forward they are bounded.
"""

from __future__ import annotations

import pytest
import torch

import weft
from tests.families import zoo
from tests.language.hooks import with_hooks
from weft.errors import (
    InputError,
    LookError,
    OutsideTraceError,
    RecordingError,
    UnknownOptionError,
    WeftError,
)
from weft.testing.same import bitwise, bounded, moves

A, B, C = [torch.tensor([row]) for row in zoo.tokens(9, 4, 6, seed=1)]


def layer(subject, number):
    return subject.model.get(subject.paths.layer(number))


def hidden(value):
    """A layer's hidden states: some layers return a tuple."""
    return value[0] if isinstance(value, tuple) else value


# -- each as alone ---------------------------------------------------------------------------------


def test_each_invoke_is_its_input_alone(subject):
    expected = []
    for ids in (A, B, C):
        seen = with_hooks(subject.net, {f"{subject.paths.layer(1)}.output": None}, ids)
        expected.append((hidden(seen[f"{subject.paths.layer(1)}.output"]), seen.result.logits))
    with subject.model.trace(alone=True) as tracer:
        got = []
        for ids in (A, B, C):
            with tracer.invoke(ids):
                h = hidden(layer(subject, 1).output)
                assert tuple(h.shape[:2]) == tuple(ids.shape)
                got.append(weft.save((h, tracer.result.logits)))
    for one, other in zip(got, expected, strict=True):
        bitwise(list(one), list(other))


def test_an_edit_is_seen_in_its_own_invoke_only(subject):
    def half(value):
        hidden(value)[:, -1] *= 0.5

    with torch.no_grad():
        plain = subject.net(B).logits
    edited = with_hooks(subject.net, {f"{subject.paths.layer(1)}.output": half}, B).result.logits
    with subject.model.trace(alone=True) as tracer:
        with tracer.invoke(B):
            hidden(layer(subject, 1).output)[:, -1] *= 0.5
            one = tracer.result.logits.save()
        with tracer.invoke(B):
            other = tracer.result.logits.save()
    bitwise(one, edited)
    bitwise(other, plain)
    moves(one, plain)


def test_several_prompts_in_one_invoke_are_a_batch(llama):
    with llama.model.trace([A[0].tolist(), B[0].tolist()]):
        expected = llama.layer_list[1].output.save()
    with llama.model.trace(alone=True) as tracer:
        with tracer.invoke(C):
            pass
        with tracer.invoke([A[0].tolist(), B[0].tolist()]) as both:
            h = llama.layer_list[1].output.save()
            assert tracer.lengths == both.lengths == (9, 4)
            assert both.mask.sum(-1).tolist() == [9, 4]
    bitwise(h, expected)


def test_invokes_of_texts(tiny):
    prompts = ["The capital of France is", "Mary gave"]
    with tiny.model.trace() as tracer:
        found = []
        for prompt in prompts:
            with tracer.invoke(prompt):
                found.append(tiny.model.lm_head.output.save())
    for prompt, logits in zip(prompts, found, strict=True):
        with tiny.model.trace(prompt):
            expected = tiny.model.lm_head.output.save()
        bounded(logits, expected)


def test_a_save_is_frozen_and_reads_see_edits(model):
    h = model.transformer.h
    with model.trace() as tracer:
        with tracer.invoke(A):
            pass
        with tracer.invoke(B):
            before = h[1].output.save()
            h[1].output[:] = 0
            after = h[1].output.save()
    with model.trace(B):
        expected = h[1].output.save()
    bounded(before, expected)
    assert not after.any()


def test_saves_have_names_across_invokes(model):
    with model.trace() as tracer:
        with tracer.invoke(A):
            model.lm_head.output.save("a")
        with tracer.invoke(B):
            model.lm_head.output.save("b")
    assert {name: value.shape[1] for name, value in tracer.results.items()} == {"a": 9, "b": 4}


def test_values_are_combined_outside(model):
    h = model.transformer.h
    with model.trace() as tracer:
        with tracer.invoke(A):
            a = h[2].output[0, -1]
        with tracer.invoke(B):
            b = h[2].output[0, -1]
        apart = (a - b).norm().save()
        lens = model.lm_head(model.transformer.ln_f(a + b)).save()
    with model.trace(A):
        x = h[2].output[0, -1].save()
    with model.trace(B):
        y = h[2].output[0, -1].save()
    bounded(apart, (x - y).norm())
    assert lens.shape == (zoo.VOCAB,)


def test_looks_see_the_invoke_alone(model):
    h = model.transformer.h
    with model.trace(A):
        norm = h[1].output.norm().save()
    with model.trace() as tracer:
        with tracer.invoke(B):
            small = float(h[1].output.norm())
        with tracer.invoke(A):
            large = float(h[1].output.norm())
            if large > small:
                h[2].output[:] = 0
            out = h[2].output.save()
    assert large == pytest.approx(float(norm), rel=1e-5)
    assert (not out.any()) == (large > small)


def test_a_look_forbids_earlier_edits_of_its_own_invoke_only(model):
    h = model.transformer.h
    with model.trace() as tracer:
        with tracer.invoke(A):
            assert float(h[2].output.norm()) > 0
        with tracer.invoke(B):
            h[0].output[:] = 0
            model.lm_head.output.save()
    with (
        pytest.raises(RecordingError, match="looked at"),
        model.trace() as tracer,
        tracer.invoke(A),
    ):
        assert float(h[2].output.norm()) > 0
        h[0].output[:] = 0


def test_logs_come_from_each(model, capsys):
    with model.trace() as tracer:
        for name, ids in (("a", A), ("b", B)):
            with tracer.invoke(ids):
                tracer.log(name, model.transformer.h[0].output.shape[1])
                tracer.log(name, model.transformer.h[0].output.sum() * 0)
    said = capsys.readouterr().out
    assert "a 9" in said and "b 4" in said


def test_random_draws_are_those_of_the_input_alone(model):
    h = model.transformer.h

    def noise():
        h[1].output += 0.1 * torch.randn_like(h[1].output)
        return model.lm_head.output.save()

    alone = []
    for ids in (A, B):
        with model.trace(ids, seed=7):
            alone.append(noise())
    with model.trace(seed=7, alone=True) as tracer:
        found = []
        for ids in (A, B):
            with tracer.invoke(ids):
                found.append(noise())
    bitwise(found, alone)


def test_without_a_seed_no_two_invokes_draw_the_same(model):
    with model.trace() as tracer:
        drawn = []
        for _ in range(2):
            with tracer.invoke(A):
                drawn.append(torch.randn_like(model.transformer.h[0].output).save())
    assert not torch.equal(*drawn)


def test_a_receiver_gathers_from_all(model):
    rows = torch.zeros(2, 32)
    with model.trace() as tracer:
        for number, ids in enumerate((A, B)):
            with tracer.invoke(ids):
                rows[number] = model.transformer.h[1].output[0, -1]
    for number, ids in enumerate((A, B)):
        with model.trace(ids):
            expected = model.transformer.h[1].output[0, -1].save()
        bounded(rows[number], expected)


def test_the_last_site_needed_ends_each_forward(model, net):
    seen = []
    handle = net.transformer.h[1].register_forward_hook(lambda *a: seen.append(1))
    try:
        with model.trace() as tracer:
            for ids in (A, B):
                with tracer.invoke(ids):
                    model.transformer.h[0].output.save()
    finally:
        handle.remove()
    assert not seen


def test_options_of_one_invoke():
    model = weft.LanguageModel(zoo.build("mistral"))
    with model.trace() as tracer:
        with tracer.invoke(A, output_hidden_states=True):
            states = tracer.result.hidden_states[1].save()
        with tracer.invoke(B):
            assert tracer.result.get("hidden_states") is None
            model.lm_head.output.save()
    with model.trace(A, output_hidden_states=True) as alone:
        expected = alone.result.hidden_states[1].save()
    bounded(states, expected)


def test_options_of_the_block_hold_for_every_invoke(model):
    with model.trace(logits_to_keep=1) as tracer:
        with tracer.invoke(A):
            a = tracer.result.logits.save()
        with tracer.invoke(B, logits_to_keep=2):
            b = tracer.result.logits.save()
    assert a.shape[1] == 1 and b.shape[1] == 2


def test_scan_and_plan(model):
    with model.scan() as tracer:
        with tracer.invoke(A):
            model.lm_head.output.save()
        with tracer.invoke(B):
            assert model.lm_head.output.shape == (1, 4, zoo.VOCAB)
            model.lm_head.output.save()
    assert tracer.plan().sites == 2
    assert tracer.plan().saved_bytes == (9 + 4) * zoo.VOCAB * 4


def test_the_graph_shows_invokes_and_runs_again(model):
    with model.trace() as tracer:
        with tracer.invoke(A):
            model.lm_head.output.save("a")
        with tracer.invoke(B):
            model.lm_head.output.save("b")
    kept = tracer.graph
    assert "lm_head.output of invoke 1" in str(kept)
    again = kept.run(model, C, A)
    for name, ids in (("a", C), ("b", A)):
        with model.trace(ids):
            expected = model.lm_head.output.save()
        bounded(again[name], expected)


# -- all of them -----------------------------------------------------------------------------------


def test_an_empty_invoke_shows_the_whole_batch(subject):
    rows = [ids[0].tolist() for ids in (A, B, C)]
    with subject.model.trace(rows) as tracer:
        expected = tracer.result.logits.save()
    with subject.model.trace() as tracer:
        with tracer.invoke(A):
            pass
        with tracer.invoke(rows[1:]):
            pass
        with tracer.invoke() as whole:
            logits = tracer.result.logits.save()
            assert whole.lengths == (9, 4, 6)
    bitwise(logits, expected)


def test_an_empty_invoke_shows_what_the_others_changed(llama):
    layers = llama.layer_list
    with llama.model.trace() as tracer:
        with tracer.invoke(A):
            a = tracer.result.logits.save()
        with tracer.invoke(B):
            layers[1].output[:, -1] *= 0.5
            b = tracer.result.logits.save()
        with tracer.invoke():
            whole = tracer.result.logits.save()
    with torch.no_grad():
        moves(b, llama.net(B).logits)
    bounded(whole[0], a[0])
    bounded(whole[1, 5:], b[0])


def test_edits_in_an_empty_invoke_are_its_own(llama):
    layers = llama.layer_list
    with llama.model.trace(alone=True) as tracer:
        with tracer.invoke(A):
            a = tracer.result.logits.save()
        with tracer.invoke():
            layers[1].output[:] = 0
        with tracer.invoke():
            whole = layers[1].output.save()
    with torch.no_grad():
        bitwise(a, llama.net(A).logits)
    assert not whole.any()


def test_an_empty_invoke_comes_last(model):
    with pytest.raises(RecordingError, match="none yet"), model.trace() as tracer, tracer.invoke():
        pass
    with pytest.raises(RecordingError, match="after an empty one"), model.trace() as tracer:
        with tracer.invoke(A):
            pass
        with tracer.invoke():
            pass
        with tracer.invoke(B):
            pass
    with pytest.raises(RecordingError, match="comes last"), model.trace() as tracer:
        with tracer.invoke(A):
            h = model.transformer.h[1].output
            h[:] = 0
        with tracer.invoke():
            model.lm_head.output.save()
        h[:] = 1


# -- any module ------------------------------------------------------------------------------------


def test_invokes_of_any_module():
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    model = weft.Model(net, batch_dim=0)
    x, y = torch.randn(3, 4), torch.randn(1, 4)
    with model.trace() as tracer:
        with tracer.invoke(x):
            a = model[0].output.save()
            model[1].output[:, 0] = 5
            out = model[2].output.save()
        with tracer.invoke(y):
            b = model[2].output.save()
        with tracer.invoke():
            whole = model[2].output.save()
    hidden = torch.relu(net[0](x)).detach()
    hidden[:, 0] = 5
    with torch.no_grad():
        bitwise(a, net[0](x))
        bounded(out, net[2](hidden))
        bounded(b, net(y))
    bounded(whole, torch.cat([out, b]))


def test_a_module_without_inputs_needs_no_invoke():
    class Source(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.last = torch.nn.Linear(2, 2)

        def forward(self):
            return self.last(torch.ones(1, 2))

    net = Source()
    model = weft.Model(net)
    with model.trace():
        out = model.last.output.save()
    with torch.no_grad():
        bitwise(out, net())


def test_inputs_that_are_no_batch_together():
    model = weft.Model(torch.nn.Sequential(torch.nn.ReLU()), batch_dim=0)
    with pytest.raises(InputError, match="no batch together"), model.trace() as tracer:
        with tracer.invoke(torch.ones(1, 2)):
            pass
        with tracer.invoke(torch.ones(1, 3)):
            pass
        with tracer.invoke():
            pass


# -- refusals --------------------------------------------------------------------------------------


def test_sites_outside_of_invokes(model):
    with pytest.raises(OutsideTraceError, match="outside of an invoke"), model.trace() as tracer:
        with tracer.invoke(A):
            pass
        model.lm_head.output.save()
    with pytest.raises(OutsideTraceError, match=r"tracer\.invoke"), model.trace():
        model.lm_head.output.save()
    with pytest.raises(WeftError, match="several inputs"), model.trace() as tracer:
        _ = tracer.lengths


def test_no_prompt_at_all(model):
    with pytest.raises(InputError, match="prompt"), model.trace():
        pass


def test_an_invoke_inside_another(model):
    with (
        pytest.raises(RecordingError, match="inside another"),
        model.trace() as tracer,
        tracer.invoke(A),
        tracer.invoke(B),
    ):
        pass


def test_an_invoke_in_a_block_with_an_input(model):
    with (
        pytest.raises(RecordingError, match="has an input already"),
        model.trace(A) as tracer,
        tracer.invoke(B),
    ):
        pass


@pytest.mark.parametrize("option", ["seed", "device", "remote", "blocking", "alone"])
def test_options_of_the_block_are_no_options_of_an_invoke(model, option):
    with (
        pytest.raises(UnknownOptionError, match=rf"model\.trace\({option}="),
        model.trace() as tracer,
        tracer.invoke(A, **{option: 1}),
    ):
        pass


def test_unknown_options(model):
    with pytest.raises(UnknownOptionError, match="alone is True or False"):
        model.trace(alone=1)
    with (
        pytest.raises(UnknownOptionError, match="unknown option"),
        model.trace() as tracer,
        tracer.invoke(A, layers=3),
    ):
        pass
    with pytest.raises(UnknownOptionError, match="unknown option"):
        model.trace(layers=3)


def test_a_wrong_input_is_refused_at_its_line(model):
    with (
        pytest.raises(InputError, match="vocabulary"),
        model.trace() as tracer,
        tracer.invoke(torch.tensor([[zoo.VOCAB]])),
    ):
        pass


def test_an_error_in_an_invoke_leaves_nothing_open(model):
    with pytest.raises(ZeroDivisionError), model.trace() as tracer, tracer.invoke(A):
        h = model.lm_head.output.save()
        _ = 1 / 0
    with pytest.raises(WeftError, match="did not finish"):
        h.sum()
    with model.trace(A):
        model.lm_head.output.save()


def test_a_scan_of_invokes_refuses_looks(model):
    with pytest.raises(LookError), model.scan() as tracer, tracer.invoke(A):
        float(model.lm_head.output.sum())
