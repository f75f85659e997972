"""`trace(eager=True)`: what `print`, f-strings and debuggers show in a block.

Oracles: plain forward hooks, and what the same block brings back.
"""

from __future__ import annotations

import io
import pdb
import threading
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.families import zoo
from tests.language import sources
from tests.language.generated import generated
from tests.language.hooks import with_hooks
from tests.language.shown import shown
from tests.language.test_attached import Autoencoder
from weft.errors import EagerWarning
from weft.testing.same import bitwise, bounded, moves

A, B = ([zoo.tokens(n, seed=n)[0]] for n in (9, 5))
KEY = "transformer.h.{}.output"


# -- one forward -----------------------------------------------------------------------------------


def test_print_shows_the_numbers_of_the_pass(subject):
    layer = subject.paths.layer(1)
    seen = with_hooks(subject.net, {f"{layer}.output": None}, subject.ids)[f"{layer}.output"]
    hidden = seen[0] if isinstance(seen, tuple) else seen
    with subject.model.trace(subject.ids, eager=True):
        h = subject.model.get(layer).output
        h = h[0] if isinstance(h, tuple) else h
        whole, text, doubled, row = shown(h), repr(h), str(h * 2), f"{h[0, -1]}"
        number = f"{h.float().mean():.4f}"
        assert list(h.shape) == list(hidden.shape)
    bitwise(whole, hidden)
    assert text == repr(hidden)
    assert doubled == str(hidden * 2)
    assert row == f"{hidden[0, -1]}"
    assert number == f"{hidden.float().mean():.4f}"


def test_a_debugger_shows_them(model, net, ids):
    seen = with_hooks(net, {KEY.format(1): None}, ids)[KEY.format(1)]
    out = io.StringIO()
    debugger = pdb.Pdb(stdin=io.StringIO("p h[0, 0, :3]\npp total\nc\n"), stdout=out, nosigint=True)
    debugger.use_rawinput = False
    with model.trace(ids, eager=True):
        h = model.transformer.h[1].output
        total = h.sum()
        debugger.set_trace()
        kept = total.save()
    assert repr(seen[0, 0, :3]) in out.getvalue()
    assert repr(kept) in out.getvalue()


def test_containers_show_the_numbers_in_them(model, net, ids):
    with torch.no_grad():
        expected = net(ids)
    with model.trace(ids, eager=True) as tracer:
        text = repr(tracer.result.logits)
        both = repr([model.transformer.h[0].output[0, 0, :2], {"a": tracer.result.logits[0, 0, 0]}])
        whole = repr(model.transformer.h[0].attn.output)
    assert text == repr(expected.logits)
    assert repr(expected.logits[0, 0, 0]) in both
    assert whole.startswith("(tensor([[[")


def test_an_edit_is_seen_at_once_and_further_down(model, net, ids, v):
    def push(out):
        out = out.clone()
        out[:, -1] += v
        return out

    plain = with_hooks(net, {KEY.format(0): None}, ids)[KEY.format(0)]
    seen = with_hooks(net, {KEY.format(0): push, KEY.format(2): None}, ids)
    with model.trace(ids, eager=True):
        h = model.transformer.h[0].output
        before = shown(h)
        h[:, -1] += v
        after, site = shown(h), shown(model.transformer.h[0].output)
        later = shown(model.transformer.h[2].output)
    bitwise(before, plain)
    bitwise([after, site], [push(plain)] * 2)
    bitwise(later, seen[KEY.format(2)])
    moves(later, with_hooks(net, {KEY.format(2): None}, ids)[KEY.format(2)])


def test_edits_through_views_and_replacements(model, ids):
    with model.trace(ids, eager=True):
        h = model.transformer.h[1].output
        row = h[:, 2]
        row.zero_()
        row[:, :4] = 5
        part = shown(h[0, 2])
        model.transformer.h[2].output = h * 3
        three = shown(model.transformer.h[2].output[0, 2])
    plain = torch.zeros(32)
    plain[:4] = 5
    bitwise([part, three], [plain, plain * 3])


def test_lines_in_any_order(model, net, ids):
    def zero(out):
        return out * 0

    seen = with_hooks(net, {KEY.format(0): zero, KEY.format(1): None, KEY.format(2): None}, ids)
    plain = with_hooks(net, {KEY.format(1): None, KEY.format(2): None}, ids)
    with model.trace(ids, eager=True):
        last = model.transformer.h[2].output
        first = shown(last), shown(model.transformer.h[1].output)
        assert repr(last)
        with pytest.warns(EagerWarning, match=r"transformer\.h\.0\.output.*test_eager\.py"):
            model.transformer.h[0].output = model.transformer.h[0].output * 0
        again, middle = shown(last), shown(model.transformer.h[1].output)
        kept = last.save()
    bitwise(first, (plain[KEY.format(2)], plain[KEY.format(1)]))
    bitwise([again, kept], [seen[KEY.format(2)]] * 2)
    bitwise(middle, seen[KEY.format(1)])


def test_what_was_not_shown_can_change_without_a_word(model, ids):
    with model.trace(ids, eager=True):
        last = model.transformer.h[2].output
        shown(model.transformer.h[0].input)
        model.transformer.h[0].output[:] = 0
        kept = last.save()
    assert kept.shape == (1, 9, 32)


def test_a_handle_shows_the_version_it_was_read_at(model, ids):
    with model.trace(ids, eager=True):
        site = model.transformer.h[1]
        old = site.output
        site.output = old * 2
        one, two, kept = shown(old), shown(site.output), old.save()
    bitwise([one, one * 2], [kept, two])


def test_a_tensor_of_ones_own_shows_what_was_written_into_it(model, net, ids):
    seen = with_hooks(net, {KEY.format(n): None for n in range(3)}, ids)
    rows = torch.zeros(3, 32)
    with model.trace(ids, eager=True):
        for n in range(2):
            rows[n] = model.transformer.h[n].output[0, -1]
        text, part = repr(rows), f"{rows[1]}"
        rows[2] = rows[1]
    plain = torch.stack([seen[KEY.format(n)][0, -1] for n in range(2)] + [torch.zeros(32)])
    assert text == repr(plain)
    assert part == f"{plain[1]}"
    bitwise(rows[2], plain[1])


# -- the rest of the language ----------------------------------------------------------------------


def test_gradients(model, ids):
    w = torch.ones(32, requires_grad=True)
    with model.trace(ids, eager=True):
        h = model.transformer.h[1].output
        loss = (model.lm_head.output.pow(2).sum(-1) * (h * w).sum(-1)).sum()
        with loss.backward():
            inside = model.transformer.h[2].output.grad
            flowing = shown(inside)
            inside[:, 0] = 0
            changed, behind = shown(inside), shown(h.grad)
            kept = weft.save([inside, h.grad])
        mine, after = shown(w.grad), h.grad.save()
        again = shown(h.grad)
    assert flowing[:, 0].abs().sum() > 0 and changed[:, 0].abs().sum() == 0
    bitwise([changed, behind], [*kept])
    bitwise([again, mine], [after, w.grad])


def test_a_gradient_whose_backward_stands_below_has_no_numbers_yet(model, ids):
    with model.trace(ids, eager=True):
        h = model.transformer.h[1].output
        grad = h.grad
        doubled = grad * 2
        before, beside = repr(grad), shown(h)
        assert repr(doubled).startswith("float32[1, 9, 32] from")
        model.lm_head.output.sum().backward()
        after = shown(doubled)
        kept = weft.save([h, doubled])
    assert before.startswith("float32[1, 9, 32] from")
    bitwise([beside, after], [*kept])


def test_skips_and_stops(model, net, ids):
    with model.trace(ids, eager=True) as tracer:
        model.transformer.h[1].skip(model.transformer.h[0].output * 2)
        skipped = shown(model.transformer.h[1].output)
        kept = model.transformer.h[1].output.save()
        tracer.stop()
        late = repr(model.transformer.h[2].output)
    bitwise([skipped, kept], [with_hooks(net, {KEY.format(0): None}, ids)[KEY.format(0)] * 2] * 2)
    assert late.startswith("float32[1, 9, 32] from transformer.h.2.output")  # it has no numbers


@pytest.mark.parametrize("alone", [False, True])
def test_several_inputs(model, net, alone):
    seen = with_hooks(net, {KEY.format(0): None}, torch.tensor(A))[KEY.format(0)][:, -1]
    with model.trace(eager=True, alone=alone) as tracer:
        with tracer.invoke(A):
            first = model.transformer.h[0].output[:, -1]
            one = shown(first)
        with tracer.invoke(B):
            model.transformer.h[1].output[:, -1] = first
            two = shown(model.transformer.h[2].output)
            kept = model.transformer.h[2].output.save()
        with tracer.invoke():
            three, whole = shown(model.lm_head.output), model.lm_head.output.save()
        outside, kept_first = shown(first + 1), (first + 1).save()
    same = bitwise if alone else bounded
    same([one, two, outside, three], [seen, kept, kept_first, whole])


def test_patching_backwards_between_inputs(model):
    """A later site of one input goes into an earlier one of another: two passes."""
    with model.trace(eager=True, alone=True) as tracer:
        with tracer.invoke(A):
            source = model.transformer.h[2].output[:, -1]
        with tracer.invoke(B):
            model.transformer.h[0].output[:, -1] = source
            seen = shown(model.lm_head.output)
            kept = model.lm_head.output.save()
    bitwise(seen, kept)


def test_generations(model, net, ids):
    layer = "transformer.h.1.output"
    calm = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}

    def half(step, out):
        return out * 0.5

    expected = generated(net, ids, {layer: half, KEY.format(2): None}, **calm)
    rows: list[Any] = []
    with model.generate(ids, eager=True, **calm) as tracer:
        model.transformer.h[1].output = model.transformer.h[1].output * 0.5
        first = shown(model.transformer.h[2].output)
        for _ in tracer.iter[1:3]:
            h = model.transformer.h[2].output
            assert list(h.shape) == [1, 1, 32]
            rows.append((shown(h), repr(h[0, 0, :2])))
        with tracer.iter[3]:
            rows.append((shown(model.transformer.h[2].output), ""))
        answer = shown(tracer.result)
        kept = tracer.result.save()
    bitwise([first, *[row for row, _ in rows]], [expected[KEY.format(2), n] for n in range(4)])
    assert rows[0][1] == repr(expected[KEY.format(2), 1][0, 0, :2])
    bitwise([answer, kept], [expected.result] * 2)


def test_next_and_all_in_a_generation(model, net, ids):
    calm = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    expected = generated(net, ids, {KEY.format(0): None}, **calm)
    found = []
    with model.generate(ids, eager=True, **calm) as tracer:
        for _ in tracer.all():
            found.append(shown(model.transformer.h[0].output))
    with model.generate(ids, eager=True, **calm) as tracer:
        tracer.next()
        found.append(shown(model.transformer.h[0].output))
        if model.transformer.h[0].output.sum() > -1e9:
            tracer.result.save("ids")
    bitwise(found, [expected[KEY.format(0), n] for n in (0, 1, 2, 1)])
    bitwise(tracer.results["ids"], expected.result)


def test_steps_that_never_happen_have_no_numbers(model, net, ids):
    first = int(generated(net, ids, {}, max_new_tokens=1).result[0, -1])
    ended = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": first}
    with model.generate(ids, eager=True, **ended) as tracer:
        with tracer.iter[2]:
            never = repr(model.transformer.h[0].output)
        tracer.result.save()
    assert never.startswith("float32[1, 1, 32] from transformer.h.0.output")


def test_operations_inside_a_forward(place):
    net = sources.eager("gpt2")
    model = sources.opened(place, net)
    with model.trace(sources.IDS, eager=True):
        softmax = sources.attention_of(model, "gpt2").source.softmax_0
        pattern = softmax.output
        before = shown(pattern)
        pattern[:, 0] = 0
        after, kept = shown(softmax.output), softmax.output.save()
    bounded(before.sum(-1), torch.ones(1, 4, 9))
    bitwise(after, kept)


def test_edits_of_the_model_and_modules_of_ones_own(model, net, ids):
    with model.edit() as edited:
        model.transformer.h[0].output[:, -1] *= 0.5
    sae = Autoencoder()
    edited.transformer.h[1].sae = sae
    try:
        with edited.trace(ids, eager=True):
            h = edited.transformer.h[1]
            start = shown(edited.transformer.h[0].output)
            coded = h.sae(h.output)
            hidden, before = shown(h.sae.encoder.output), shown(coded)
            h.sae.act.output[:, :, 0] = 3.0
            moves(shown(coded), before)
            h.output = coded
            seen, kept = shown(h.output), weft.save([h.output, h.sae.act.output])
    finally:
        del edited.transformer.h[1].sae
    plain = with_hooks(net, {KEY.format(0): None}, ids)[KEY.format(0)]
    plain[:, -1] *= 0.5
    bitwise(start, plain)
    assert hidden.shape == (1, 9, 48)
    bitwise(seen, kept[0])
    assert bool((kept[1][:, :, 0] == 3).all())


def test_random_draws_show_what_comes_back(model, ids):
    with model.trace(ids, eager=True, seed=2):
        h = model.transformer.h[0].output
        noise = torch.randn_like(h)
        model.transformer.h[0].output[:] += noise
        seen, later = shown(noise), shown(model.transformer.h[2].output)
        kept = weft.save([noise, model.transformer.h[2].output])
    bitwise([seen, later], [*kept])


def test_another_thread_sees_what_a_value_is_but_runs_nothing(model, ids):
    texts: list[str] = []
    with model.trace(ids, eager=True):
        h = model.transformer.h[0].output
        thread = threading.Thread(target=lambda: texts.append(repr(h)))
        thread.start()
        thread.join()
        h.sum().save()
    assert texts[0].startswith("float32[1, 9, 32] from transformer.h.0.output")


def test_any_module_and_modes_of_its_own():
    """A model that draws and counts: only the real run leaves its mark, and it draws the same."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(self.norm(self.inner(x)))

    def run(**options: Any) -> Any:
        torch.manual_seed(0)
        net = Counting().train()
        model = weft.Model(net)
        with model.trace(torch.ones(3, 4) + torch.arange(4), **options):
            dropped = model.drop.output * 2
            text = repr(dropped)
            repr(model.norm.output)
            kept = dropped.save()
        return [kept, net.norm.running_mean, net.norm.num_batches_tracked, torch.rand(3)], text

    eager, text = run(eager=True)
    bitwise(eager, run()[0])
    assert text == repr(eager[0])
