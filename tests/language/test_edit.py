"""`model.edit()`: changes with which every later trace begins. The oracle is hooks by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.families import zoo
from tests.language.hooks import with_hooks
from weft.testing.same import bitwise, bounded, moves

H1, MLP2, C0 = "transformer.h.1.output", "transformer.h.2.mlp.output", "transformer.h.0.attn.c_proj"


@pytest.fixture
def prompts(ids):
    """One prompt, a longer one, a batch."""
    return ids, torch.cat([ids, ids.flip(1)], 1), torch.cat([ids, ids.flip(1), ids // 2], 0)[:, :5]


def halved(h):
    return h * 0.5


def adding(v):
    def edit(h):
        h[:, -1] += v

    return edit


def logits_of(model, ids, **options):
    with model.trace(ids, **options):
        logits = model.output.logits.save()
    return logits


def test_an_edit_acts_in_every_trace_of_the_edited_handle(subject):
    """A fill, a write and an edit of an input, on every architecture, at several sizes."""
    model, net, paths = subject.model, subject.net, subject.paths
    with model.edit() as edited:
        model.get(paths.layer(0)).output[:, -1] *= 3
        model.get(paths.mlp(1)).output = model.get(paths.mlp(1)).output * 0.5
        model.get(paths.layer(2)).input[:, 0] = 0

    def last(h):
        h[:, -1] *= 3

    def first(h):
        h[:, 0] = 0

    hooks = {
        f"{paths.layer(0)}.output": last,
        f"{paths.mlp(1)}.output": halved,
        f"{paths.layer(2)}.input": first,
    }
    several = torch.cat([subject.ids, subject.ids.flip(1)], 0)
    for ids in (subject.ids, several[:, :4], subject.ids[:, :1]):
        expected = with_hooks(net, hooks, ids).result.logits
        bitwise(logits_of(edited, ids), expected)
        plain = with_hooks(net, {}, ids).result.logits
        moves(expected, plain)
        bitwise(logits_of(model, ids), plain)  # the handle itself is as it was


def test_a_trace_reads_what_the_edit_made_and_edits_after_it(model, net, ids, v):
    def twice(h):
        h[:, -1] += v
        h *= 2

    expected = with_hooks(net, {H1: twice, "transformer.h.2.output": None}, ids)
    made = with_hooks(net, {H1: adding(v)}, ids)
    with model.edit() as edited:
        model.transformer.h[1].output[:, -1] += v
    with edited.trace(ids):
        seen = edited.transformer.h[1].output.save()
        edited.transformer.h[1].output *= 2
        after = model.transformer.h[2].output.save()  # modules are those of both handles
    bitwise(seen, made[H1])
    bitwise(after, expected["transformer.h.2.output"])


def test_edits_are_made_in_their_order(model, net, ids):
    def plus_then_half(h):
        return (h + 1) * 0.5

    def half_then_plus(h):
        return h * 0.5 + 1

    with model.edit() as plus:
        model.transformer.h[1].output = model.transformer.h[1].output + 1
    with plus.edit() as one:
        model.transformer.h[1].output = model.transformer.h[1].output * 0.5
    with model.edit() as half:
        model.transformer.h[1].output = model.transformer.h[1].output * 0.5
    with half.edit() as other:
        model.transformer.h[1].output = model.transformer.h[1].output + 1
    bitwise(logits_of(one, ids), with_hooks(net, {H1: plus_then_half}, ids).result.logits)
    bitwise(logits_of(other, ids), with_hooks(net, {H1: half_then_plus}, ids).result.logits)
    bitwise(logits_of(plus, ids), with_hooks(net, {H1: lambda h: h + 1}, ids).result.logits)
    with pytest.raises(AssertionError):
        bitwise(logits_of(one, ids), logits_of(other, ids))


def test_inplace_changes_the_handle_and_clearing_gives_it_back(model, net, ids):
    plain = logits_of(model, ids)
    with model.edit(inplace=True) as edited:
        model.transformer.h[2].mlp.output[:] = 0
    try:
        assert edited is model
        with model.edit(inplace=True):
            model.transformer.h[1].output *= 2
        hooks = {H1: lambda h: h * 2, MLP2: torch.zeros_like}
        bitwise(logits_of(model, ids), with_hooks(net, hooks, ids).result.logits)
    finally:
        model.clear_edits()
    bitwise(logits_of(model, ids), plain)


def test_clearing_one_handle_leaves_the_others(model, net, ids):
    with model.edit() as one:
        model.transformer.h[1].output *= 0.5
    with one.edit() as two:
        model.transformer.h[2].mlp.output *= 0.5
    one.clear_edits()
    bitwise(logits_of(one, ids), with_hooks(net, {}, ids).result.logits)
    both = with_hooks(net, {H1: halved, MLP2: halved}, ids).result.logits
    bitwise(logits_of(two, ids), both)


def test_a_block_without_changes_changes_nothing(model, ids):
    with model.edit() as edited:
        _ = model.transformer.h[1].output * 2
    assert not edited._edits
    bitwise(logits_of(edited, ids), logits_of(model, ids))


def test_an_edit_whose_block_fails_is_none(model, ids):
    plain = logits_of(model, ids)
    with pytest.raises(KeyError), model.edit(inplace=True):
        model.transformer.h[1].output[:] = 0
        raise KeyError("x")
    assert not model._edits
    bitwise(logits_of(model, ids), plain)


# -- what edits are made of ------------------------------------------------------------------------


def test_skips_weights_applied_modules_and_values_of_other_sites(model, net, ids, prompts):
    with model.edit() as edited:
        h = model.transformer.h
        h[1].skip(h[1].input + h[0].mlp.output * model.transformer.ln_f.weight)
        h[2].output = h[2].output + model.transformer.ln_f(h[0].output)

    twin = copy.deepcopy(net)
    kept = {}
    twin.transformer.h[0].mlp.register_forward_hook(lambda m, a, out: kept.update(mlp=out))
    twin.transformer.h[0].register_forward_hook(lambda m, a, out: kept.update(h=out))
    weight = net.transformer.ln_f.weight
    twin.transformer.h[1].forward = lambda h, *a, **k: h + kept["mlp"] * weight
    twin.transformer.h[2].register_forward_hook(
        lambda m, a, out: out + net.transformer.ln_f(kept["h"])
    )
    for ids in prompts:
        with torch.no_grad():
            expected = twin(ids).logits
        bitwise(logits_of(edited, ids), expected)


def test_heads_by_views_and_sizes_that_stay_open(model, net, prompts):
    with model.edit() as edited:
        z = model.transformer.h[0].attn.c_proj.input
        z.unflatten(-1, (4, -1))[:, :, 2] = 0
        noise = torch.ones(model.transformer.h[1].output.shape)
        model.transformer.h[1].output = model.transformer.h[1].output + noise

    def ablate(z):
        z.unflatten(-1, (4, -1))[:, :, 2] = 0

    hooks = {f"{C0}.input": ablate, H1: lambda h: h + 1}
    for ids in prompts:
        bitwise(logits_of(edited, ids), with_hooks(net, hooks, ids).result.logits)


def test_a_module_of_the_users(model, net, prompts):
    """A sparse autoencoder, run on the client when the edit is recorded."""
    torch.manual_seed(0)
    sae = nn.Sequential(nn.Linear(32, 80), nn.ReLU(), nn.Linear(80, 32))
    with model.edit() as edited:
        model.transformer.h[1].output = sae(model.transformer.h[1].output)
    for ids in prompts:
        bounded(logits_of(edited, ids), with_hooks(net, {H1: sae}, ids).result.logits)


def test_tensors_are_taken_by_value(model, net, ids, v):
    mine = v.clone()
    with model.edit() as edited:
        model.transformer.h[1].output[:, -1] += mine
    mine.zero_()
    bitwise(logits_of(edited, ids), with_hooks(net, {H1: adding(v)}, ids).result.logits)


def test_parameters_are_followed_and_get_gradients(model, net, ids):
    """Three steps of training a parameter inside of an edit, as with a hook that stays."""

    def train(loss_of):
        torch.manual_seed(0)
        adapter = nn.Linear(32, 32)
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        step = loss_of(adapter)
        for _ in range(3):
            optimizer.zero_grad()
            step()
            optimizer.step()
        return [*adapter.parameters()]

    def ours(adapter):
        with model.edit() as edited:
            layer = model.transformer.h[1]
            layer.output = layer.output + adapter(layer.output)

        def step():
            with edited.trace(ids):
                edited.lm_head.output[0, -1].pow(2).mean().backward()

        return step

    def by_hand(adapter):
        def step():
            hook = net.transformer.h[1].register_forward_hook(lambda m, a, h: h + adapter(h))
            try:
                loss = net(ids).logits[0, -1].pow(2).mean()
            finally:
                hook.remove()
            grads = torch.autograd.grad(loss, [*adapter.parameters()])
            for parameter, grad in zip(adapter.parameters(), grads, strict=True):
                parameter.grad = grad

        return step

    bounded(train(ours), train(by_hand))


def test_random_draws_leave_those_of_the_trace_as_they_are(model, ids):
    with model.edit() as edited:
        h = model.transformer.h[1].output
        h += torch.randn_like(h)

    def draw(handle, seed):
        with handle.trace(ids, seed=seed):
            mine: Any = torch.rand_like(model.transformer.h[0].output)
            mine = mine.save()
            logits = model.lm_head.output.save()
        return mine, logits

    mine, logits = draw(edited, 3)
    again, same = draw(edited, 3)
    alone, plain = draw(model, 3)
    bitwise(mine, alone)
    bitwise((mine, logits), (again, same))
    moves(logits, plain)
    moves(logits, draw(edited, 4)[1])


# -- where edits act -------------------------------------------------------------------------------


def test_invokes(model, net, ids):
    """Each is edited as it is alone, and the empty one shows it."""

    def first_and_last(h):
        h[:, 0] = 0
        h[:, -1] *= 2

    with model.edit() as edited:
        h = model.transformer.h[1].output
        h[:, 0] = 0
        h[:, -1] *= 2
    short = ids[:, :4]
    with edited.trace() as tracer:
        with tracer.invoke(ids):
            one = model.lm_head.output.save()
        with tracer.invoke(short):
            model.transformer.h[1].output += 1
            two = model.lm_head.output.save()
        with tracer.invoke():
            whole = model.lm_head.output.save()

    def and_more(h):
        first_and_last(h)
        h += 1

    bounded(one, with_hooks(net, {H1: first_and_last}, ids).result.logits)
    bounded(two, with_hooks(net, {H1: and_more}, short).result.logits)
    bounded(whole[0], one[0])
    bounded(whole[1, -4:], two[0])


def test_an_empty_invoke_of_a_model_that_was_edited_first(ids):
    """The inputs that stand for any are none whose numbers matter, as those of a mask would."""
    net = zoo.build("gpt2", n_positions=80)  # no other test has this one
    model = weft.LanguageModel(net)
    with model.edit() as edited:
        model.transformer.h[1].output *= 2
    with edited.trace() as tracer:
        with tracer.invoke(ids):
            model.transformer.h[1].output[:, 0] = 0
        with tracer.invoke():
            logits = model.lm_head.output.save()

    def twice_and_first(h):
        h *= 2
        h[:, 0] = 0

    bounded(logits, with_hooks(net, {H1: twice_and_first}, ids).result.logits)


def test_padded_prompts(tiny):
    model, texts = tiny.model, ["Tom", "The capital of France is"]
    with model.edit() as edited:
        model.model.layers[1].output[:, -1] *= 2
    with edited.trace(texts):
        together = model.lm_head.output[:, -1].save()
    for row, text in enumerate(texts):
        bounded(together[row], logits_of(edited, text)[0, -1])
    moves(together[0], logits_of(model, texts[0])[0, -1])


def test_gradients_go_through_an_edit(model, net, ids):
    with model.edit() as edited:
        model.transformer.h[1].output *= 3
    with edited.trace(ids):
        grad = model.transformer.h[0].output.grad
        model.lm_head.output[0, -1].pow(2).sum().backward()
        grad = grad.save()
    kept = {}

    def keep(m, a, h):
        kept["h"] = h.requires_grad_()

    hooks = [
        net.transformer.h[0].register_forward_hook(keep),
        net.transformer.h[1].register_forward_hook(lambda m, a, h: h * 3),
    ]
    try:
        loss = net(ids).logits[0, -1].pow(2).sum()
        (expected,) = torch.autograd.grad(loss, kept["h"])
    finally:
        for hook in hooks:
            hook.remove()
    bounded(grad, expected)


def test_looks_scans_plans_and_graphs(model, net, ids, v):
    with model.edit() as edited:
        model.transformer.h[1].output[:, -1] += v
    made = with_hooks(net, {H1: adding(v)}, ids)
    with edited.trace(ids) as tracer:
        h = model.transformer.h[1].output
        assert h.sum().item() == pytest.approx(made[H1].sum().item(), rel=1e-5)
        model.lm_head.output.save("logits")
    with edited.scan(ids) as tracer:
        model.lm_head.output.save("logits")
    text = str(tracer.graph)
    assert "fill transformer.h.1.output" in text
    assert text.count("test_edit.py") == text.count("\n") + 1  # each has its line, the edit's too
    other = ids.flip(1)
    expected = with_hooks(net, {H1: adding(v)}, other).result.logits
    bitwise(tracer.graph.run(model, other)["logits"], expected)


def test_an_experiment_runs_on_an_edited_handle(model, net, ids, v):
    """Its graph comes after the edits, in every invoke, and draws what it draws."""

    def and_half(h):
        h[:, -1] += v
        h *= 0.5

    with model.trace(ids, seed=5) as tracer:
        model.transformer.h[1].output *= 0.5
        noise: Any = torch.randn_like(model.transformer.h[0].output)
        noise.save("noise")
        model.lm_head.output.save("logits")
    with model.edit() as edited:
        h = model.transformer.h[1].output
        h[:, -1] += v
        h += torch.randn_like(h) * 0
    with edited.edit() as edited:
        model.transformer.h[0].mlp.output = model.transformer.h[0].mlp.output * 1
    for other in (ids, ids.flip(1)[:, :5]):
        got = tracer.graph.run(edited, other)
        bitwise(got["logits"], with_hooks(net, {H1: and_half}, other).result.logits)
    bitwise(tracer.graph.run(edited, ids)["noise"], tracer.graph.run(model, ids)["noise"])

    with model.trace() as tracer:
        with tracer.invoke(ids):
            model.lm_head.output.save("one")
        with tracer.invoke(ids[:, :3]):
            model.lm_head.output.save("two")
    got = tracer.graph.run(edited, ids[:, :4], ids)
    bounded(got["one"], with_hooks(net, {H1: adding(v)}, ids[:, :4]).result.logits)
    bounded(got["two"], with_hooks(net, {H1: adding(v)}, ids).result.logits)


def test_nobody_is_warned_of_an_edit_that_has_no_effect_in_one_block(model, ids):
    """Warnings are errors here."""
    with model.edit() as edited:
        model.transformer.h[2].output *= 2
    with edited.trace(ids):
        model.transformer.h[0].output.save()


def test_any_module():
    """Its shapes are learnt from an example; other sizes may come."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    model = weft.Model(net)
    with model.edit(torch.zeros(2, 4)) as edited:
        model[1].output[:, 0] = 1

    def one(h):
        h[:, 0] = 1

    for rows in (1, 2, 7):
        x = torch.randn(rows, 4)
        with edited.trace(x):
            out = model.output.save()
        bitwise(out, with_hooks(net, {"1.output": one}, x).result)


def test_an_edit_for_one_prompt(model, net, ids):
    """With an example, a tensor of its very shape may be put in place."""
    kept = with_hooks(net, {H1: None}, ids.flip(1))[H1]
    with model.edit(ids) as edited:
        model.transformer.h[1].output = kept
    bitwise(logits_of(edited, ids), with_hooks(net, {H1: lambda h: kept}, ids).result.logits)


def test_operations_inside_of_forwards(model, net, prompts, ids, tmp_path):
    """`source`: an output is edited, a call skipped; also from a file, and before an experiment."""
    with model.edit() as edited:
        act = model.transformer.h[1].mlp.source.self_act_0
        act.output = act.output * 0.5
        model.transformer.h[0].mlp.source.self_act_0.skip(model.transformer.h[0].mlp.c_fc.output)
    edited.save_edits(tmp_path / "inside.weft")
    loaded = model.load_edits(tmp_path / "inside.weft")
    with model.trace(ids) as tracer:
        model.transformer.h[2].mlp.source.self_act_0.output[:] = 0
        model.lm_head.output.save("logits")

    twin = copy.deepcopy(net)
    twin.transformer.h[0].mlp.act = nn.Identity()
    hooks = {"transformer.h.1.mlp.act.output": halved}
    for some in prompts:
        expected = with_hooks(twin, hooks, some).result.logits
        bitwise(logits_of(edited, some), expected)
        bitwise(logits_of(loaded, some), expected)
        moves(expected, with_hooks(net, hooks, some).result.logits)
    hooks["transformer.h.2.mlp.act.output"] = lambda h: h * 0
    got = tracer.graph.run(edited, ids)["logits"]
    bitwise(got, with_hooks(twin, hooks, ids).result.logits)


def test_generation(model, net, ids):
    """At every step; what the block does at one of them comes after it."""
    with model.edit() as edited:
        model.transformer.h[1].output *= 3
        model.transformer.h[2].mlp.output = model.transformer.h[2].mlp.output * 0.5
    options = {"max_new_tokens": 5, "do_sample": False}
    with edited.generate(ids, **options) as tracer:
        with tracer.iter[2]:
            seen = model.transformer.h[1].output.save()
            model.transformer.h[1].output += 1
        tokens = tracer.result.save()

    calls = []

    def layer(m, a, h):
        calls.append(h * 3)
        return calls[-1] + 1 if len(calls) == 3 else calls[-1]

    hooks = [
        net.transformer.h[1].register_forward_hook(layer),
        net.transformer.h[2].mlp.register_forward_hook(lambda m, a, h: h * 0.5),
    ]
    try:
        expected = net.generate(ids, **options, pad_token_id=0)
    finally:
        for hook in hooks:
            hook.remove()
    bitwise(tokens, expected)
    bounded(seen, calls[2])
    assert not torch.equal(tokens, net.generate(ids, **options, pad_token_id=0))


def test_draws_of_an_edit_leave_those_of_a_generation_as_they_are(model, ids):
    with model.edit() as edited:
        h = model.transformer.h[1].output
        h += torch.randn_like(h)

    def drawn(handle):
        values: Any = []
        with handle.generate(ids, max_new_tokens=3, do_sample=False, seed=3) as tracer:
            for _ in tracer.iter[:]:
                h = model.transformer.h[0].output
                h = h[:, -1]
                values.append(torch.rand_like(h).save())
        return values

    bitwise(drawn(edited), drawn(model))


def test_sweeps(model, net, ids):
    with model.edit() as edited:
        model.transformer.h[1].output *= 3

    def zeroed(tracer, layer):
        model.transformer.h[layer].output[:, 0] = 0
        return model.lm_head.output[0, -1]

    got = edited.sweep(ids, zeroed, layer=range(3))

    def first(h):
        h[:, 0] = 0

    def three(h):
        h *= 3

    for layer in range(3):
        hooks = {H1: three}
        key = f"transformer.h.{layer}.output"
        hooks[key] = (lambda h: first(three(h) or h)) if key == H1 else first
        expected = with_hooks(net, hooks, ids).result.logits[0, -1]
        bounded(got.values[layer], expected)
