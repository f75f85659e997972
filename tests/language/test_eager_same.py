"""`trace(eager=True)` changes no result: the oracle is the same block without it, and hooks.

Every block is run three times: as it is, eagerly, and eagerly with all its values printed on the
way. Graphs, results and refusals must be the same.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from torch import nn

import weft
from tests.families import zoo
from tests.language import sources
from tests.language.shown import shown
from tests.robust.programs import Line, Refused, by_hooks, constants, programs, source
from tests.robust.tower import prompt, remember, tower
from weft.errors import EagerWarning, LateEditError, StaleHandleError
from weft.testing.same import bitwise

A, B = ([zoo.tokens(n, seed=n)[0]] for n in (9, 5))
pytestmark = pytest.mark.filterwarnings("ignore::weft.errors.EagerWarning")


def edits(model: Any, tracer: Any, see: Any) -> Any:
    h = model.transformer.h
    h[0].output[:, -1] *= 0.5
    see(h[0].output)
    h[2].mlp.output = see(h[1].mlp.output.flip(1))
    noise = see(torch.randn_like(h[1].output))
    h[1].output[:] = h[1].output + noise
    out = torch.zeros(3, 9, 32)
    for number, layer in enumerate(h):
        out[number] = see(layer.output)[:1]
        see(out)
    return [h[1].output, out * 1, model.lm_head(h[2].output), h[0].attn.c_proj.weight.sum()]


def looks(model: Any, tracer: Any, see: Any) -> Any:
    h = model.transformer.h
    see(h[0].output)
    if see(h[1].output.mean()) > -1e9:
        h[2].output[:, 0] = h[1].output[:, 0]
    picked = h[1].output[see(h[1].output > 0.3)]
    scaled = h[1].output * h[1].output[0, 0, 0].item()
    return [h[2].output, picked, scaled, tracer.result.logits]


def gradients(model: Any, tracer: Any, see: Any) -> Any:
    h = model.transformer.h
    hidden = h[0].output
    loss = see(model.lm_head.output[:, -1].pow(2).sum())
    with loss.backward():
        see(h[1].output.grad)
        h[1].output.grad *= 2
    hidden[:] = hidden
    return [see(hidden.grad), loss]


def gradients_first(model: Any, tracer: Any, see: Any) -> Any:
    h = model.transformer.h
    early = see(h[0].output.grad * 2)
    see(h[1].output)
    model.lm_head.output.sum().backward()
    again = torch.autograd.grad(h[2].output.pow(3).sum(), h[1].output)[0]
    return [early, see(again)]


def skips(model: Any, tracer: Any, see: Any) -> Any:
    h = model.transformer.h
    see(h[0].output)
    h[1].skip(h[0].output + 1)
    return [see(h[1].output), h[2].output]


def stops(model: Any, tracer: Any, see: Any) -> Any:
    kept = see(model.transformer.h[1].output)
    tracer.stop_if(see(kept.abs().sum() > 0))
    return [kept * 2]


def frozen(model: Any, tracer: Any, see: Any) -> Any:
    h = model.transformer.h[1].output
    early = see(h).save()
    h[:] = 0
    see(early)
    return [early, h, see(model.transformer.h[2].output)]


def logs(model: Any, tracer: Any, see: Any) -> Any:
    h = model.transformer.h[0].output
    tracer.log("sum", see(h.sum()))
    return [see(h + 1)]


BLOCKS = [edits, looks, gradients, gradients_first, skips, stops, frozen, logs]


def see(value: Any) -> Any:
    repr(value)
    return value


def unseen(value: Any) -> Any:
    return value


WAYS = [({"eager": True}, unseen), ({"eager": True}, see)]


@pytest.mark.parametrize("block", BLOCKS)
def test_results_graphs_and_lines_of_the_log(model, ids, block, capsys):
    def run(options: dict[str, Any], look: Any) -> tuple[Any, ...]:
        with model.trace(ids, seed=3, **options) as tracer:
            kept = weft.save(block(model, tracer, look))
        return [one.clone() for one in kept], str(tracer.graph), capsys.readouterr().out

    plain, graph, log = run({}, unseen)
    for way in WAYS:
        got, its_graph, its_log = run(*way)
        bitwise(got, plain)
        assert its_graph == graph
        assert its_log == log


def test_several_inputs_and_caches(model):
    def run(options: dict[str, Any], look: Any) -> Any:
        with model.trace(seed=1, **options) as tracer:
            with tracer.invoke(A):
                first = look(model.transformer.h[1].output)
                cache = tracer.cache([model.transformer.h[2]], inputs=True)
                late = model.transformer.h[2].output
            with tracer.invoke(B):
                model.transformer.h[1].output[:, -1] = look(first[:, -1])
                model.transformer.h[0].output[:, 0] = look(late[:, 0])
                kept = look(model.lm_head.output).save()
            with tracer.invoke():
                whole = look(model.lm_head.output).save()
        return [kept, whole, cache["transformer.h.2"].output, cache["transformer.h.2"].inputs[0][0]]

    plain = run({}, unseen)
    for way in WAYS:
        bitwise(run(*way), plain)


def template(model: Any, tracer: Any, look: Any) -> Any:
    h = model.transformer.h
    h[0].output[:, -1] *= look(h[0].output.mean())
    rows = weft.save([])
    for step in tracer.iter[1:]:
        h[1].output[:, -1] += 0.1 * step
        rows.append(look(h[2].output[:, -1] * torch.rand(1)))
        if look(h[2].output.sum()) > -1e9:
            rows.append(h[2].mlp.output)
    return rows


def moved(model: Any, tracer: Any, look: Any) -> Any:
    rows = [look(model.lm_head.output[:, -1])]
    for _ in range(2):
        tracer.next()
        rows.append(look(model.lm_head.output[:, -1]))
    with tracer.iter[0]:
        model.transformer.h[0].output[:, 0] = 0
    return weft.save(rows)


@pytest.mark.parametrize("block", [template, moved])
@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 20}])
def test_generations(model, ids, block, options):
    given = {"max_new_tokens": 4, "seed": 5, "eos_token_id": None, **options}

    def run(more: dict[str, Any], look: Any) -> tuple[Any, str]:
        torch.manual_seed(4)
        with model.generate(ids, **given, **more) as tracer:
            answer = look(tracer.result).save()
            rows = block(model, tracer, look)
        return [answer, [one.clone() for one in rows]], str(tracer.graph)

    plain, graph = run({}, unseen)
    for way in WAYS:
        torch.manual_seed(4)
        got, its_graph = run(*way)
        bitwise(got, plain)
        assert its_graph == graph


def test_generations_of_several_inputs(model):
    def run(options: dict[str, Any], look: Any) -> Any:
        with model.generate(max_new_tokens=3, do_sample=False, eos_token_id=None, **options) as t:
            with t.invoke(A):
                first = look(model.transformer.h[1].output[:, -1])
                one = t.result.save()
            with t.invoke(B):
                with t.iter[1]:
                    model.transformer.h[1].output[:, -1] = first
                    look(model.transformer.h[2].output)
                two = look(t.result).save()
        return [one, two]

    plain = run({}, unseen)
    for way in WAYS:
        bitwise(run(*way), plain)


def test_operations_inside_a_forward(place):
    model = sources.opened(place, sources.eager("gpt2"))

    def run(options: dict[str, Any], look: Any) -> Any:
        with model.trace(sources.IDS, **options):
            softmax = sources.attention_of(model, "gpt2").source.softmax_0
            look(softmax.output)
            softmax.output[..., 0] = 0
            kept = weft.save([look(softmax.output), look(model.lm_head.output)])
        return [*kept]

    plain = run({}, unseen)
    for way in WAYS:
        bitwise(run(*way), plain)


def test_traces_of_a_session(model, ids):
    def run(options: dict[str, Any], look: Any) -> list[Any]:
        with model.session():
            with model.trace(ids, **options):
                first = look(model.transformer.h[2].output[:, -1])
            with model.trace(ids, **options):
                model.transformer.h[0].output[:, -1] = look(first)
                kept = look(model.lm_head.output).save()
        return [kept]

    plain = run({}, unseen)
    for way in WAYS:
        bitwise(run(*way), plain)


def test_gradients_that_are_kept_for_after_the_block(model, ids):
    def run(options: dict[str, Any], look: Any) -> torch.Tensor:
        w = torch.ones(32, requires_grad=True)
        with model.trace(ids, grad=True, **options):
            loss = look((look(model.transformer.h[1].output) * w).sum()).save()
        loss.backward()
        assert w.grad is not None
        return w.grad

    plain = run({}, unseen)
    for way in WAYS:
        bitwise(run(*way), plain)


def test_what_is_shown_is_what_an_operation_on_its_layout_gives():
    """Views, transposes and slices have the strides that they have in the run."""
    torch.manual_seed(0)
    net = nn.Linear(24, 24)
    model = weft.Model(net)
    x = torch.randn(7, 24)
    with model.trace(x, eager=True):
        h = model.output
        heads = h.reshape(7, 4, 6).transpose(0, 1)
        score = heads @ heads.transpose(1, 2)
        values = [heads, score, score.softmax(-1) @ heads, h.T[:, ::2].sum(1), h[:1].expand(7, -1)]
        seen = [shown(one) for one in values] + [shown(values[-1] @ h.T)]
        kept = weft.save([*values, values[-1] @ h.T])
    bitwise(seen, [*kept])


def test_what_is_fetched_alone_has_the_layout_of_the_run():
    """A sum depends on it, in the last bits."""
    torch.manual_seed(0)
    net = nn.Linear(8, 4001)
    with weft.Model(net).trace(torch.randn(64, 8), eager=True) as tracer:
        part = tracer.result[:, ::2]
        other = torch.zeros_like(part)
        other[0] = 1  # from here on nothing is known
        seen, kept = shown(part.sum(1)), part.sum(1).save()
    bitwise(seen, kept)


# -- random programs -------------------------------------------------------------------------------

NET = tower()
MODEL = weft.Model(NET)
IDS = prompt()


def run_program(lines: list[Line], eager: bool) -> Any:
    """What the block saves; of an eager one every line is followed by a print of its value."""
    head, *rest = source(lines).split("\n")
    if eager:
        head = head.replace("(ids)", "(ids, eager=True)")
        names = [line.makes or line.changes for line in lines]
        prints = [f"    see({name})" if name else "" for name in names]
        rest = [text for both in zip(rest, prints, strict=True) for text in both if text]
    text = "\n".join([head, *rest])
    remember("<program>", text)
    found: dict[str, torch.Tensor] = {}
    scope: dict[str, Any] = {"torch": torch, "model": MODEL, "ids": IDS, "see": see, **constants()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", weft.UnusedEditWarning)
            warnings.simplefilter("ignore", EagerWarning)
            exec(compile(text, "<program>", "exec"), scope)
    except (LateEditError, StaleHandleError) as refusal:
        return type(refusal)
    found.update(sorted(scope["tracer"].results.items()))
    return found


@settings(max_examples=60, derandomize=True, deadline=None)
@given(programs())
def test_random_programs_give_what_hooks_give(lines: list[Line]) -> None:
    note(source(lines))
    got = run_program(lines, eager=True)
    try:
        expected = by_hooks(NET, IDS, lines, constants())
    except Refused as reason:
        assert got is run_program(lines, eager=False), f"not refused: {reason}"
    else:
        assert not isinstance(got, type), "refused"
        bitwise(got, dict(sorted(expected.items())))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(programs())
def test_random_programs_show_what_they_save(lines: list[Line]) -> None:
    """Before the block closes every value shows what a save of it brings back."""
    note(source(lines))
    names = dict.fromkeys([line.makes for line in lines if line.makes])
    head, *rest = source(lines).split("\n")
    last = [f"    kept['{name}'] = shown({name}), {name}.save()" for name in names]
    text = "\n".join([head.replace("(ids)", "(ids, eager=True)"), *rest, *last])
    remember("<program>", text)
    kept: dict[str, Any] = {}
    scope = {"torch": torch, "model": MODEL, "ids": IDS, "shown": shown, "kept": kept}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", weft.UnusedEditWarning)
        try:
            exec(compile(text, "<program>", "exec"), {**scope, **constants()})
        except (LateEditError, StaleHandleError):
            return
    for seen, saved in kept.values():
        bitwise(seen, saved)
