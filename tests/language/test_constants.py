"""Client tensors in a block: constants by value, and receivers that the block writes into."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import weft
from tests.language.hooks import with_hooks
from weft.errors import ChangedConstantError, RecordingError
from weft.testing.same import bitwise, moves

KEYS = [f"transformer.h.{i}.output" for i in range(3)]


@pytest.fixture
def h(net, ids):
    """What each of the three layers gives: `[3, 9, 32]`."""
    seen = with_hooks(net, dict.fromkeys(KEYS), ids)
    return torch.cat([seen[key] for key in KEYS])


# Constants


def test_client_tensors_are_constants(subject):
    v = torch.randn(32, generator=torch.Generator().manual_seed(3)).to(subject.baseline.dtype)
    v = v if subject.paths.mlp_name and subject.net.config.hidden_size == 32 else v.repeat(4)
    with subject.model.trace(subject.ids) as tracer:
        subject.layer_list[1].output += v
        logits = tracer.result.logits.save()

    def edit(h):
        h += v

    hooks = {f"{subject.paths.layer(1)}.output": edit}
    bitwise(logits, with_hooks(subject.net, hooks, subject.ids).result.logits)
    moves(logits, subject.baseline)


NUMBERS = {
    "numpy array": np.linspace(0, 1, 32, dtype=np.float32),
    "numpy number": np.float32(0.5),
    "int": 2,
    "float": 0.25,
    "bool": True,
    "numpy matrix": np.eye(9, 32, dtype=np.float32),
    "zero-dim": torch.tensor(0.5),
    "parameter": torch.nn.Parameter(torch.ones(32)),
    "not contiguous": torch.arange(64.0).view(32, 2)[:, 1],
    "expanded": torch.tensor(2.0).expand(32),
    "a slice": torch.arange(100.0)[7:39],
    "wanting grad": torch.ones(32, requires_grad=True),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_kind_of_number(model, ids, h, name):
    number = NUMBERS[name]
    with model.trace(ids):
        right = (model.transformer.h[1].output * number).save()
        left = (number * model.transformer.h[1].output).save()
    expected = (h[1:2] * torch.as_tensor(number)).detach()
    bitwise([right, left], [expected, expected])


def test_numpys_functions_are_torchs(model, ids, h):
    with model.trace(ids) as tracer:
        got = (np.exp(model.transformer.h[1].output) - np.float32(1)).save()
    bitwise(got, torch.exp(h[1:2]) - 1)
    assert "guard" not in str(tracer.graph)


def test_a_function_that_only_numpy_has_is_refused(model, ids):
    with pytest.raises(RecordingError, match="numpy"), model.trace(ids):
        np.multiply.reduce(model.transformer.h[1].output)


def test_a_tensor_of_inference_mode_is_a_constant(model, ids, h):
    with torch.inference_mode():
        number = torch.ones(32) * 2
    with model.trace(ids):
        got = (model.transformer.h[1].output * number).save()
    bitwise(got, h[1:2] * 2)


def test_a_constant_that_is_changed_later_in_the_block_is_an_error(model, ids, v):
    with pytest.raises(ChangedConstantError) as caught, model.trace(ids):
        model.transformer.h[1].output += v  # the first use
        v += 1
        model.transformer.h[2].output += v  # the second use
    assert "# the second use" in str(caught.value.line)
    assert "# the first use" in caught.value.message


def test_a_constant_that_is_changed_and_not_used_again_is_an_error(model, ids, v):
    with pytest.raises(ChangedConstantError), model.trace(ids):
        model.transformer.h[1].output += v
        v.zero_()


def test_a_constant_may_be_changed_before_its_first_use_and_after_the_block(model, ids, h):
    number = torch.ones(32)
    with model.trace(ids) as tracer:
        number *= 3
        got = (model.transformer.h[1].output * number).save("got")
    graph = tracer.graph
    number.zero_()
    bitwise(got, h[1:2] * 3)
    bitwise(graph.run(model, ids), {"got": h[1:2] * 3})
    with pytest.raises(ChangedConstantError):
        tracer.graph


def test_a_constant_is_sent_once(model, ids, v):
    with model.trace(ids) as tracer:
        for layer in model.transformer.h:
            layer.output += v
        model.lm_head.output.save()
    assert len(tracer.graph.constants) == 1


def test_a_constant_is_not_changed_by_the_run(model, ids, v):
    before = v.clone()
    with model.trace(ids):
        model.transformer.h[1].output[:] = v
        model.transformer.h[1].output.mul_(3)
        saved = (v + model.transformer.h[1].output * 0).save()
        model.lm_head.output.save()
    saved.zero_()
    bitwise(v, before)


def test_operations_on_plain_tensors_are_not_recorded(model, ids, v):
    with model.trace(ids) as tracer:
        w = torch.relu(v) @ torch.eye(32)
        assert type(w) is torch.Tensor
        model.transformer.h[1].output += w
        model.lm_head.output.save()
    assert "relu" not in str(tracer.graph)


@pytest.mark.parametrize("how", ["op", "write", "index"])
def test_a_meta_tensor_is_refused(model, ids, how):
    meta = torch.ones(1, 9, 32, device="meta")
    with pytest.raises(RecordingError, match="meta"), model.trace(ids):
        if how == "op":
            model.transformer.h[1].output + meta
        elif how == "write":
            model.transformer.h[1].output = meta
        else:
            model.transformer.h[1].output[:] = meta


def test_a_tensor_of_another_class_is_refused(model, ids):
    sparse = torch.eye(32).to_sparse()
    with pytest.raises(RecordingError), model.trace(ids):
        model.transformer.h[1].output @ sparse


# Receivers

LENGTH, WIDTH = 9, 32


def test_activations_are_collected_into_a_tensor(subject):
    width = subject.net.config.hidden_size
    acts = torch.zeros(3, LENGTH, width, dtype=subject.baseline.dtype)
    with subject.model.trace(subject.ids):
        for i in range(3):
            acts[i] = subject.layer_list[i].output
    keys = [f"{subject.paths.layer(i)}.output" for i in range(3)]
    if len(subject.layer_list) > 3:
        keys = [f"{subject.paths.layer_list}.{i}.output" for i in range(3)]
    seen = with_hooks(subject.net, dict.fromkeys(keys), subject.ids)
    bitwise(acts, torch.cat([seen[key] for key in keys]))


# Each fills `acts [3, 9, 32]` from `layers`, a list of three `[1, 9, 32]`.


def _rows(acts, layers):
    for row, layer in zip(acts, layers, strict=True):
        row[:] = layer[0:1]


def _row_of_view(acts, layers):
    flat = acts.view(3, -1)
    flat[1] = layers[1].flatten()


RECEIVERS = {
    "acts[i] = h": lambda acts, hs: acts.__setitem__(1, hs[1]),
    "acts[i][j] = h": lambda acts, hs: acts[1].__setitem__(3, hs[1][:, 3]),
    "acts[i][j][k] = h": lambda acts, hs: acts[1][3].__setitem__(4, hs[1][0:1, 3, 4].sum()),
    "acts[:, j] = h": lambda acts, hs: acts[:, 2].__setitem__(0, hs[0][:, 2]),
    "acts[::2][1]": lambda acts, hs: acts[::2].__setitem__(1, hs[2]),
    "acts[1:][0, 2:5]": lambda acts, hs: acts[1:][0, 2:5].copy_(hs[1].squeeze(0)[2:5]),
    "acts[..., 1::3]": lambda acts, hs: acts[..., 1::3].mul_(hs[0][..., 1::3]),
    "acts.T": lambda acts, hs: acts[2].T.copy_(hs[2].squeeze(0).T),
    "acts.transpose": lambda acts, hs: acts.transpose(0, 2)[5].add_(hs[1][..., 5].T),
    "acts.permute": lambda acts, hs: acts.permute(2, 0, 1)[4:6, 1].add_(hs[1][0:1, 0, 0]),
    "acts.view": lambda acts, hs: acts.view(27, 4, 8)[3:5, 2].copy_(hs[1].view(9, 4, 8)[3:5, 2]),
    "acts.view(-1)": lambda acts, hs: acts.view(-1).__setitem__(slice(5, 9), hs[1][0, 0, :4]),
    "acts[:, None]": lambda acts, hs: acts[:, None, 4].copy_(hs[1][:, 4]),
    "acts.diagonal": lambda acts, hs: acts[0].diagonal().add_(hs[1][0, 0, :9]),
    "acts += h": lambda acts, hs: acts.add_(hs[1]),
    "acts[i] += h": lambda acts, hs: acts.__setitem__(1, acts[1] + hs[1][0:1].sum(0)),
    "acts.copy_": lambda acts, hs: acts.copy_(torch.cat(hs)),
    "torch.index_copy_": lambda acts, hs: acts.index_copy_(0, torch.tensor([2]), hs[1]),
    "a mask from h": lambda acts, hs: acts.__setitem__(torch.cat(hs) > 0, 5.0),
    "a view that mixes and turns": lambda acts, hs: acts.view(-1, 8).T[2:4].add_(hs[1].sum()),
    "rows": _rows,
    "a row of a view": _row_of_view,
    "detach": lambda acts, hs: acts.detach()[1].copy_(hs[1].squeeze(0)),
    "data": lambda acts, hs: acts.data[1].copy_(hs[1].squeeze(0)),
    "unsqueezed": lambda acts, hs: acts.unsqueeze(1)[1].copy_(hs[1]),
}


@pytest.mark.parametrize("name", RECEIVERS)
def test_a_client_tensor_is_written_also_through_views(model, ids, h, name):
    acts = torch.arange(3.0 * 9 * 32).view(3, 9, 32)
    expected = acts.clone()
    # mlp: a layer of GPT-2 warns about [0]
    with model.trace(ids):
        RECEIVERS[name](acts, [layer.mlp.output for layer in model.transformer.h])
    bitwise(type(acts) is torch.Tensor and acts, _expected(model, ids, expected, name))


def _expected(model, ids, acts, name):
    with model.trace(ids):
        hs = [layer.mlp.output.save() for layer in model.transformer.h]
    RECEIVERS[name](acts, hs)
    return acts


@pytest.mark.parametrize("name", ["acts[i] = h", "acts[i][j] = h", "acts.T", "acts += h"])
def test_a_receiver_that_is_part_of_a_bigger_tensor(model, ids, name):
    big = torch.arange(5.0 * 9 * 40).view(5, 9, 40)
    acts = big[1:4, :, 4:36]
    expected = big.clone()
    before = big.clone()
    with model.trace(ids):
        RECEIVERS[name](acts, [layer.mlp.output for layer in model.transformer.h])
    bitwise(acts, _expected(model, ids, expected[1:4, :, 4:36], name))
    bitwise([big[0], big[4], big[..., :4]], [before[0], before[4], before[..., :4]])


def test_later_operations_on_a_receiver_are_recorded(model, ids):
    acts = torch.zeros(3, 9, 32)
    with model.trace(ids):
        acts[0] = model.transformer.h[0].output
        model.transformer.h[1].mlp.output[:] = acts[0] * 0
        for i in range(3):
            acts[i] = model.transformer.h[i].output
        mean = acts.mean(0).save()
        total = (acts[1] + 1).sum().save()
        acts *= 2
    with model.trace(ids):
        model.transformer.h[1].mlp.output[:] = 0
        h = torch.cat([weft.save(layer.output) for layer in model.transformer.h]).save()
    bitwise([acts, mean, total], [h * 2, h.mean(0), (h[1] + 1).sum()])


def test_a_view_made_before_the_write_is_recorded_too(model, ids, h):
    acts = torch.zeros(3, 9, 32)
    row = acts[1]
    with model.trace(ids):
        acts[1] = model.transformer.h[1].output
        twice = (row * 2).save()
        row += 1
    bitwise([acts[1], twice, row], [h[1] + 1, h[1] * 2, h[1] + 1])


def test_a_receiver_is_looked_at_with_its_new_numbers(model, ids, h):
    acts = torch.zeros(3, 9, 32)
    with model.trace(ids):
        acts[1] = model.transformer.h[1].output
        seen = acts[1].sum().item()
        if acts[0].any():
            raise AssertionError
    assert seen == h[1].sum().item()


def test_a_receiver_edits_the_model_as_it_is_at_that_line(model, ids, h):
    acts = torch.zeros(1, 9, 32)
    with model.trace(ids):
        acts[:] = model.transformer.h[0].output
        model.transformer.h[1].output = acts
        acts.zero_()
        got = model.transformer.h[1].output.save()
    bitwise(got, h[0:1])
    assert not acts.any()


def test_numpy_of_a_receiver_is_a_look(model, ids, h):
    acts = torch.zeros(3, 9, 32)
    with model.trace(ids):
        acts[1] = model.transformer.h[1].output
        inside = acts.numpy().copy()
    assert (inside == acts.numpy()).all()
    bitwise(acts[1], h[1])


def test_a_receiver_may_be_changed_after_the_block(model, ids):
    acts = torch.zeros(3, 9, 32)
    with model.trace(ids) as tracer:
        acts[1] = model.transformer.h[1].output
        (model.transformer.h[2].output + acts[1]).save("h")
    before = tracer.graph.run(model, ids)
    acts += 1
    bitwise(tracer.graph.run(model, ids), before)


@pytest.mark.parametrize("fails", ["block", "run"])
def test_a_receiver_is_unchanged_when_the_block_or_the_run_fails(model, net, ids, fails):
    def boom(*_):
        raise OSError("boom")

    acts = torch.zeros(3, 9, 32)
    handle = net.transformer.h[2].register_forward_hook(boom) if fails == "run" else None
    try:
        with pytest.raises(OSError, match="boom"), model.trace(ids):
            acts[1] = model.transformer.h[1].output
            acts[2] = model.transformer.h[2].output
            if fails == "block":
                boom()
    finally:
        if handle:
            handle.remove()
    assert not acts.any()


def test_the_graph_of_a_receiver_writes_nothing_when_it_runs_again(model, ids, h):
    acts = torch.zeros(3, 9, 32)
    with model.trace(ids) as tracer:
        acts[1][2] = model.transformer.h[1].output[:, 2]
        acts.sum().save("sum")
    total = acts.sum()
    acts.zero_()
    bitwise(tracer.graph.run(model, ids), {"sum": total})
    assert not acts.any()


def test_the_version_of_a_receiver_rises(model, ids):
    """So that PyTorch notices a tensor that was needed for a gradient and has changed."""
    acts = torch.zeros(3, 9, 32)
    before = acts._version
    with model.trace(ids):
        acts[1][2] = model.transformer.h[1].output[:, 2]
    assert acts._version > before


def test_a_receiver_seen_as_another_dtype_is_refused(model, ids):
    acts = torch.zeros(3, 9, 32)
    bits = acts.view(torch.int32)
    with pytest.raises(RecordingError, match="dtype"), model.trace(ids):
        acts[1] = model.transformer.h[1].output
        bits + 1


def test_floats_are_written_into_a_receiver_of_another_dtype(model, ids, h):
    acts = torch.zeros(3, 9, 32, dtype=torch.float64)
    with model.trace(ids):
        acts[1] = model.transformer.h[1].output
    bitwise(acts[1], h[1].double())
