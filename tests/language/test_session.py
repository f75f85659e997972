"""`model.session()`: traces that share values without `.save()`. The oracle is hooks by hand."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import weft
from tests.families import zoo
from tests.language.hooks import with_hooks
from weft.errors import (
    FailedRunError,
    NotReachedError,
    NotSavedError,
    RecordingError,
    UnknownOptionError,
)
from weft.testing.same import bitwise, moves

H = ["transformer.h.0.output", "transformer.h.1.output", "transformer.h.2.output"]


def other_of(ids):
    return ids.flip(1)


# -- values flow -----------------------------------------------------------------------------------


def test_a_value_of_one_trace_is_written_in_the_next(subject, remote):
    model, net, paths, ids = subject.model, subject.net, subject.paths, subject.ids
    key = f"{paths.layer(1)}.output"
    source = with_hooks(net, {key: None}, other_of(ids))[key]

    def patch(h):
        h[:, -1] = source[:, -1]

    expected = with_hooks(net, {key: patch}, ids).result.logits
    with model.session(remote=remote):
        with model.trace(other_of(ids)):
            h = model.get(paths.layer(1)).output[:, -1]
        with model.trace(ids):
            model.get(paths.layer(1)).output[:, -1] = h
            logits = model.output.logits.save()
    bitwise(logits, expected)
    moves(logits, subject.baseline)


def test_every_way_in_which_a_value_is_used(model, net, ids, remote):
    """Arithmetic with it on either side, in containers, in a skip, a whole write, an index."""
    old = with_hooks(net, dict.fromkeys(H), other_of(ids))
    with model.session(remote=remote):
        with model.trace(other_of(ids)):
            h0, h1, h2 = [layer.output for layer in model.transformer.h]
            top = h2[0, :, 0].argmax()
            row = model.lm_head.output[:, -1]
        with model.trace(ids):
            h = model.transformer.h
            mixed = torch.stack([h0, h[0].output]).mean(0)
            h[0].output = mixed
            h[1].skip(h1 - h[1].input)
            h[2].output = torch.cat([h2[:, :1], h[2].output[:, 1:]], 1)
            picked = h[2].output[0, top].save()
            logits = model.lm_head.output.save()
        both = row + logits[:, -1]  # between traces it is the tensor that it is

    kept = {}
    twin = zoo.build("gpt2")
    twin.load_state_dict(net.state_dict())
    blocks = twin.transformer.h
    blocks[0].register_forward_hook(lambda m, a, out: torch.stack([old[H[0]], out]).mean(0))
    blocks[1].forward = lambda x, *a, **k: old[H[1]] - x
    blocks[2].register_forward_hook(
        lambda m, a, out: kept.setdefault("h", torch.cat([old[H[2]][:, :1], out[:, 1:]], 1))
    )
    with torch.no_grad():
        expected = twin(ids).logits
    bitwise(logits, expected)
    bitwise(picked, kept["h"][0, old[H[2]][0, :, 0].argmax()])
    bitwise(both, old.result.logits[:, -1] + expected[:, -1])


def test_a_sum_over_a_loop_of_traces(model, net, ids, remote):
    prompts = [ids[:, :n] for n in range(1, 9)]
    total = 0.0
    with model.session(remote=remote) as session:
        for prompt in prompts:
            with model.trace(prompt):
                total = total + model.transformer.h[1].output[0, -1]
            assert len(session) == 1  # the sums before are gone
        with model.trace(ids):
            total = (total / len(prompts)).save()
    expected = 0.0
    for prompt in prompts:
        expected = expected + with_hooks(net, {H[1]: None}, prompt)[H[1]][0, -1]
    bitwise(total, expected / len(prompts))


def test_values_collected_in_a_list(model, net, ids):
    prompts = [ids[:, :4], other_of(ids)[:, :4], ids[:, 4:8]]
    collected = []
    with model.session():
        for prompt in prompts:
            with model.trace(prompt):
                collected.append(model.transformer.h[1].output[0, -1])
        with model.trace(ids):
            direction = torch.stack(collected).mean(0)
            model.transformer.h[1].output[:, -1] += direction
            logits = model.lm_head.output.save()
    rows = [with_hooks(net, {H[1]: None}, prompt)[H[1]][0, -1] for prompt in prompts]

    def steer(h):
        h[:, -1] += torch.stack(rows).mean(0)

    bitwise(logits, with_hooks(net, {H[1]: steer}, ids).result.logits)


def test_a_value_that_a_later_trace_writes_into(model, net, ids, remote):
    old, new = (with_hooks(net, {H[1]: None}, one)[H[1]] for one in (other_of(ids), ids))
    with model.session(remote=remote):
        with model.trace(other_of(ids)):
            h = model.transformer.h[1].output
        with model.trace(ids):
            h[:, 0] = model.transformer.h[1].output[:, 3]
        mine = h + 0
    expected = old.clone()
    expected[:, 0] = new[:, 3]
    bitwise(mine, expected)


def test_the_same_part_of_another_traces_tensor_is_written(model, net, ids, remote):
    """Not mistaken for the second half of `h[:, 0] += ...`."""
    old, new = (with_hooks(net, {H[1]: None}, one)[H[1]] for one in (other_of(ids), ids))
    with model.session(remote=remote):
        with model.trace(other_of(ids)):
            h = model.transformer.h[1].output
        with model.trace(ids):
            h[:, 0] = model.transformer.h[1].output[:, 0]
        mine = h + 0
    expected = old.clone()
    expected[:, 0] = new[:, 0]
    bitwise(mine, expected)


def test_a_handle_is_what_it_was_when_its_trace_ended(model, net, ids):
    """Frozen at its version; an edit through it is in it, one through another handle is not."""
    plain = with_hooks(net, {H[1]: None}, ids)[H[1]]
    with model.session():
        with model.trace(ids):
            before = model.transformer.h[1].output
            h = model.transformer.h[1].output
            h[:, 0] = 0
        with model.trace(ids):
            difference = (before - h).save()
    expected = torch.zeros_like(plain)
    expected[:, 0] = plain[:, 0]
    bitwise(difference, expected)


def test_what_is_written_into_one_later_is_not_seen_in_another(model, net, ids, remote):
    """Two accesses of a site, and a view: each has a tensor of its own."""
    plain = with_hooks(net, {H[1]: None}, ids)[H[1]]
    with model.session(remote=remote):
        with model.trace(ids):
            one, two = model.transformer.h[1].output, model.transformer.h[1].output
            row = one[:, 0]
        one.zero_()
        with model.trace(ids):
            row[:] = model.transformer.h[1].output[:, 5]
        bitwise(two + 0, plain)
        bitwise(row + 0, plain[:, 5])
        assert not (one + 0).any()


def test_between_traces_it_is_a_tensor(model, net, ids, tmp_path, remote):
    """Also for what looks closer than operations do."""
    plain = with_hooks(net, {H[1]: None}, ids)[H[1]]
    with model.session(remote=remote):
        with model.trace(ids):
            h = model.transformer.h[1].output
        torch.save({"h": h}, tmp_path / "h.pt")
        assert isinstance(h, torch.Tensor)
        assert (h.dtype, h.ndim, list(h.shape)) == (plain.dtype, plain.ndim, list(plain.shape))
        found = [
            torch.load(tmp_path / "h.pt", weights_only=True)["h"],
            pickle.loads(pickle.dumps(h)),
            copy.deepcopy(h),
            torch.from_numpy(np.asarray(h)),
            torch.tensor(h.tolist()),
            torch.from_dlpack(h),
            nn.Parameter(h.clone()).detach(),
            torch.stack(list(h)),
            torch.func.vmap(lambda row: row * 1)(h),
            next(iter(DataLoader(TensorDataset(h), batch_size=1)))[0],
        ]
        linear = nn.Linear(32, 2)
        linear.load_state_dict({"weight": h[0, :2], "bias": h[0, 0, :2]})
    for one in found:
        assert type(one) is torch.Tensor
        bitwise(one + 0, plain)
    bitwise(linear.weight.detach(), plain[0, :2])


def test_saved_in_a_later_trace_it_stays(model, net, ids):
    kept = []
    with model.session():
        with model.trace(ids):
            h, g, f = [layer.output for layer in model.transformer.h]
        with model.trace(ids):
            h.save()
            weft.save([g])
            weft.save(kept)
            kept.append(f)
            model.lm_head.output.save()
    expected = with_hooks(net, dict.fromkeys(H), ids)
    for value, key in zip((h, g, f), H, strict=True):
        bitwise(value + 0, expected[key])


def test_between_two_models(model, net, ids):
    torch.manual_seed(1)
    probe = nn.Linear(32, 3)
    head = weft.Model(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 3)))
    with model.session():
        with model.trace(ids):
            h = model.transformer.h[1].output[:, -1]
        with head.trace(torch.zeros(1, 32)):
            head[0].output = h
            out = head.output.save()
        mine = probe(h)
    row = with_hooks(net, {H[1]: None}, ids)[H[1]][:, -1]
    bitwise(out, head[1](row).detach())
    bitwise(mine.detach(), probe(row).detach())


# -- what is kept ----------------------------------------------------------------------------------


def test_only_what_somebody_holds_is_kept(model, ids):
    with model.session() as session:
        with model.trace(ids):
            _ = model.transformer.h[0].output * 2
            h = model.transformer.h[1].output
            g = h * 2
            saved = h.mean().save()
        assert len(session) == 3  # `_`, `h`, `g`
        tensors = [weakref.ref(one._real) for one in (_, h, g)]
        del g, _
        gc.collect()
        assert [one() is None for one in tensors] == [True, False, True]
        assert len(session) == 1
    assert tensors[1]() is None
    assert type(saved) is torch.Tensor
    with pytest.raises(NotSavedError, match=r"not saved") as caught:
        h + 1
    assert "h = model.transformer.h[1].output" in str(caught.value.line)


def test_a_trace_of_which_nothing_is_held_ends_early(model, ids):
    with model.session():
        with model.trace(ids) as tracer:
            model.transformer.h[0].output.mean().save()
            model.transformer.h[2].output.mean()
        assert tracer.ended is not None
        assert tracer.ended.path == "transformer.h.0"


def test_nothing_piles_up_in_a_long_loop(model, ids):
    alive = weakref.WeakSet()
    h = torch.zeros(32)
    with model.session() as session:
        for _ in range(20):
            with model.trace(ids):
                h = h * 0.5 + model.transformer.h[1].output[0, -1]
            alive.add(_Holder.of(h))
            gc.collect()
            assert len(session) == 1
            assert len(alive) <= 2


class _Holder:
    """Lives as long as a tensor's storage."""

    @staticmethod
    def of(value):
        return value._real.untyped_storage()


def test_the_graph_of_a_trace_is_that_outside_of_a_session(model, ids):
    def experiment():
        with model.trace(ids) as tracer:
            h = model.transformer.h[1].output
            (h * 2).sum().save("x")
        assert tracer.results.keys() == {"x"}
        return tracer.graph.hash, h

    with model.session():
        inside, _ = experiment()
    outside, _ = experiment()
    assert inside == outside


# -- what goes wrong -------------------------------------------------------------------------------


def test_an_error_in_one_trace_leaves_the_session_clear(model, net, ids):
    with model.session() as session:
        with model.trace(ids):
            good = model.transformer.h[1].output
        with pytest.raises(KeyError), model.trace(ids):
            bad = model.transformer.h[1].output
            raise KeyError("x")
        with pytest.raises(IndexError), model.trace(ids):
            worse = model.transformer.h[1].output
            torch.nn.functional.embedding(torch.tensor(99), model.lm_head.weight[:3]).save()
        for lost in (bad, worse):
            with pytest.raises(FailedRunError):
                lost + 1
        assert len(session) == 1
        with model.trace(ids):
            with pytest.raises(FailedRunError):
                model.transformer.h[1].output = bad
            same = (model.transformer.h[1].output - good).save()
    assert same.abs().max() == 0
    with pytest.raises(ValueError, match="y"), model.session() as session:
        with model.trace(ids):
            h = model.transformer.h[1].output
        raise ValueError("y")
    assert not len(session)
    with pytest.raises(NotSavedError):
        h + 1
    with model.session(), model.trace(ids):
        model.lm_head.output.save()


def test_what_a_stop_has_kept_from_happening(model, ids):
    with model.session():
        with model.trace(ids) as tracer:
            early = model.transformer.h[0].output
            tracer.stop()
            late = model.transformer.h[2].output
        assert early.mean().isfinite()
        with pytest.raises(NotReachedError):
            late + 1


def test_sessions_within_blocks_and_sessions(model, ids):
    with model.session(), pytest.raises(RecordingError, match="inside another one"):
        model.session().__enter__()
    with model.trace(ids), pytest.raises(RecordingError, match="inside a block"):
        model.session().__enter__()
    session = model.session()
    with session:
        pass
    with pytest.raises(RecordingError, match="second time"):
        session.__enter__()


def test_a_place_that_there_is_not(model):
    with pytest.raises(UnknownOptionError, match="means no place"):
        model.session(remote="nowhere")


def test_a_session_of_this_machine_on_a_model_of_a_server(gpt2):
    there = weft.LanguageModel(gpt2.net, remote="http://127.0.0.1:9")
    with there.session(remote=False), there.trace(gpt2.ids) as tracer:  # and all traces in it
        there.lm_head.output.save()
    assert tracer.where == "here"


def test_another_threads_traces_are_not_in_it(model, ids):
    kept = {}

    def work():
        with model.trace(ids):
            kept["h"] = model.transformer.h[1].output

    with model.session() as session:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not len(session)
    with pytest.raises(NotSavedError):
        kept["h"] + 1
