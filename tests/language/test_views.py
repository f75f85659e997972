"""Reads and edits through views reach the model, exactly as with a plain tensor."""

from __future__ import annotations

import einops
import pytest
import torch

from tests.language.hooks import with_hooks
from weft.testing.same import bitwise, moves

# Each takes h [batch, pos, 32] and gives a view of it.
VIEWS = {
    "h[0]": lambda h: h[0],
    "h[:, -1]": lambda h: h[:, -1],
    "h[:, :, 3]": lambda h: h[:, :, 3],
    "h[:, 1::3]": lambda h: h[:, 1::3],
    "h[..., None, 4:8]": lambda h: h[..., None, 4:8],
    "h[0][2][5:9]": lambda h: h[0][2][5:9],
    "view": lambda h: h.view(*h.shape[:-1], 4, 8)[:, :, 2],
    "view(-1)": lambda h: h.view(-1)[10:50],
    "reshape": lambda h: h.reshape(-1, 32)[3],
    "transpose": lambda h: h.transpose(1, 2)[:, 5],
    "mT": lambda h: h.mT[:, 5],
    "permute": lambda h: h.permute(2, 0, 1)[7],
    "chunk": lambda h: h.chunk(4, -1)[1],
    "split": lambda h: h.split([8, 24], -1)[0],
    "unbind": lambda h: h.unbind(1)[4],
    "unflatten": lambda h: h.unflatten(-1, (4, 8))[..., 1, :],
    "flatten": lambda h: h.flatten(0, 1)[2],
    "narrow": lambda h: h.narrow(1, 2, 3),
    "select": lambda h: h.select(1, 2),
    "squeeze": lambda h: h.squeeze(0)[1],
    "unsqueeze": lambda h: h.unsqueeze(1)[:, 0, 3],
    "diagonal": lambda h: h[0].diagonal(),
    "unfold": lambda h: h.unfold(1, 2, 2)[:, 1],
    "movedim": lambda h: h.movedim(-1, 0)[3],
    "swapaxes": lambda h: h.swapaxes(0, 1)[3],
    "expand_as": lambda h: h.expand_as(h)[:, 2],
    "detach": lambda h: h.detach()[:, 2],
    "contiguous": lambda h: h.contiguous()[:, 2],
    "iteration": lambda h: list(h[0])[6],
    "rearrange": lambda h: einops.rearrange(h, "b s (n d) -> b s n d", n=4)[:, :, 3],
    "rearrange transposing": lambda h: einops.rearrange(h, "b s (n d) -> b n s d", n=4)[:, 1],
    "a chain": lambda h: h.view(1, -1, 4, 8).transpose(1, 2)[:, 1].mT[:, 2:5],
}


@pytest.mark.parametrize("name", VIEWS)
def test_an_edit_through_a_view_reaches_the_model(model, net, ids, gpt2, name):
    with model.trace(ids):
        VIEWS[name](model.transformer.h[1].mlp.output).mul_(-3)
        logits = model.lm_head.output.save()

    def edit(h):
        VIEWS[name](h).mul_(-3)

    bitwise(logits, with_hooks(net, {"transformer.h.1.mlp.output": edit}, ids).result.logits)
    moves(logits, gpt2.baseline)


@pytest.mark.parametrize("name", VIEWS)
def test_a_read_through_a_view(model, net, ids, name):
    key = "transformer.h.1.mlp.output"
    with model.trace(ids):
        got = VIEWS[name](model.transformer.h[1].mlp.output).save()
    bitwise(got, VIEWS[name](with_hooks(net, {key: None}, ids)[key]))


COPIES = {
    "a list of indices": lambda h: h[:, [0, 3]],
    "a tensor of indices": lambda h: h[:, torch.tensor([0, 3])],
    "a mask": lambda h: h[:, torch.arange(9) > 4],
    "index_select": lambda h: h.index_select(1, torch.tensor([0, 3])),
    "gather": lambda h: h.gather(1, torch.zeros(1, 9, 32, dtype=torch.int64)),
    "clone": lambda h: h.clone(),
    "arithmetic": lambda h: h + 0,
    "a reshape that copies": lambda h: h.transpose(1, 2).reshape(-1),
    "repeat": lambda h: h.repeat(1, 1, 1),
}


@pytest.mark.parametrize("name", COPIES)
def test_an_edit_of_a_copy_stays_in_the_copy(model, net, ids, gpt2, name):
    key = "transformer.h.1.mlp.output"
    with model.trace(ids):
        copy = COPIES[name](model.transformer.h[1].mlp.output)
        copy.mul_(-3)
        got = copy.save()
        logits = model.lm_head.output.save()
    bitwise(logits, gpt2.baseline)
    bitwise(got, COPIES[name](with_hooks(net, {key: None}, ids)[key]).mul_(-3))


INDICES = {
    "[:, :, 3]": (slice(None), slice(None), 3),
    "[:, [1, 3]]": (slice(None), [1, 3]),
    "[:, tensor]": (slice(None), torch.tensor([1, -1])),
    "[0, [1, 2], [5, 6]]": (0, [1, 2], [5, 6]),
    "[..., -1]": (..., -1),
    "[:, 2:-2, ::4]": (slice(None), slice(2, -2), slice(None, None, 4)),
    "[mask]": (slice(None), torch.arange(9) % 2 == 0),
    "[None]": (None, slice(None), 3),
    "[-1]": -1,
}


@pytest.mark.parametrize("name", INDICES)
def test_every_kind_of_index_reads_assigns_and_adds(model, net, ids, gpt2, name):
    index = INDICES[name]
    with model.trace(ids):
        h = model.transformer.h[1].mlp.output
        read = h[index].save()
        h[index] = h[index] * 4
        h[index] += 2.5
        logits = model.lm_head.output.save()
    original = []

    def edit(h):
        original.append(h[index].clone())
        h[index] = h[index] * 4
        h[index] += 2.5

    bitwise(logits, with_hooks(net, {"transformer.h.1.mlp.output": edit}, ids).result.logits)
    bitwise(read, original[0])
    moves(logits, gpt2.baseline)


def test_q_k_and_v_are_edited_through_chunks(model, net, ids, gpt2):
    with model.trace(ids):
        q, k, v = model.transformer.h[1].attn.c_attn.output.chunk(3, -1)
        q[:] = 0
        k.mul_(0.5)
        logits = model.lm_head.output.save()
        kept = v.save()

    def edit(qkv):
        q, k, _ = qkv.chunk(3, -1)
        q[:] = 0
        k.mul_(0.5)

    key = "transformer.h.1.attn.c_attn.output"
    seen = with_hooks(net, {key: edit}, ids)
    bitwise(logits, seen.result.logits)
    bitwise(kept, seen[key].chunk(3, -1)[2])
    moves(logits, gpt2.baseline)


def test_a_head_is_ablated_through_einops(subject):
    """The input of the output projection, one head of it set to zero."""
    path = {
        "gpt2": "attn.c_proj",
        "gpt_neox": "attention.dense",
        "opt": "self_attn.out_proj",
    }.get(subject.net.config.model_type, "self_attn.o_proj")
    heads = subject.net.config.num_attention_heads
    path = f"{subject.paths.layer(1)}.{path}"
    with subject.model.trace(subject.ids) as tracer:
        z = einops.rearrange(subject.model.get(path).input, "b s (h d) -> b s h d", h=heads)
        z[:, :, 1] = 0
        logits = tracer.result.logits.save()

    def edit(z):
        z.view(*z.shape[:2], heads, -1)[:, :, 1] = 0

    hooks = {f"{path}.input": edit}
    bitwise(logits, with_hooks(subject.net, hooks, subject.ids).result.logits)
    moves(logits, subject.baseline)


def test_a_view_made_before_an_edit_sees_it(model, ids):
    with model.trace(ids):
        h = model.transformer.h[1].output
        last = h[:, -1]
        h[:] = 7
        last = last.save()
    assert (last == 7).all()


def test_views_share_and_results_do_not(model, ids):
    with model.trace(ids):
        a = model.transformer.h[1].output * 1
        b = a[:, 0]
        c = a + 0
        b[:] = 7
        a, c = a.save(), c.save()
    assert (a[:, 0] == 7).all()
    assert (c[:, 0] != 7).any()


def test_an_einops_reduction(model, net, ids):
    key = "transformer.h.1.output"
    with model.trace(ids):
        got = einops.reduce(model.transformer.h[1].output, "b s (n d) -> b n", "mean", n=4).save()
        product = einops.einsum(
            model.transformer.h[1].output, torch.ones(32, 2), "b s d, d k -> b s k"
        ).save()
    h = with_hooks(net, {key: None}, ids)[key]
    bitwise(got, einops.reduce(h, "b s (n d) -> b n", "mean", n=4))
    bitwise(product, h @ torch.ones(32, 2))


# Places that are values themselves. Each takes h [1, 9, 32] and `i`, a number at or above 0.

PLACES = {
    "h[:, i] = 0": lambda h, i: h.__setitem__((slice(None), i), 0.0),
    "h[:, i].mul_": lambda h, i: h[:, i].mul_(-3),
    "h[:, i][:, :5]": lambda h, i: h[:, i][:, :5].zero_(),
    "h[:, i] += v": lambda h, i: h.__setitem__((slice(None), i), h[:, i] + torch.arange(32)),
    "h[0:1, i, :5]": lambda h, i: h[0:1, i, :5].zero_(),
    "h[:, i:]": lambda h, i: h[:, i:].mul_(3),
    "h[:, [i]]": lambda h, i: h.__setitem__((slice(None), i[None]), 0.0),
    "select": lambda h, i: h.select(1, i).mul_(3),
    "narrow": lambda h, i: h.narrow(1, i, 1).mul_(3),
    "index_fill_": lambda h, i: h.index_fill_(1, i, 0.0),
    "tensor_split": lambda h, i: h.tensor_split(i[None], dim=1)[0].mul_(3),
    "a client tensor's place": lambda h, i: h.mul_(torch.linspace(-1, 2, 9)[i]),
    "take_along_dim": lambda h, i: h.add_(h.take_along_dim(i.expand(1, 1, 32), 1)),
    "one_hot": lambda h, i: h.add_(torch.nn.functional.one_hot(i[None, None], 32) * 9.0),
    "h[h > 1] = tensor": lambda h, i: h.__setitem__(
        h > 1, torch.linspace(-1, 1, 288)[: int((h > 1).sum())]
    ),
    "h[h > 1] *= 2": lambda h, i: h.__setitem__(h > 1, h[h > 1] * 2),
    "nonzero": lambda h, i: h.__setitem__(tuple((h > 1).nonzero().T), 0.0),
    "masked_scatter_": lambda h, i: h.masked_scatter_(h > 1, torch.linspace(-1, 1, 288)),
}


@pytest.mark.parametrize("name", PLACES)
def test_an_edit_at_a_place_that_is_a_value(model, net, ids, gpt2, name):
    with model.trace(ids):
        mlp = model.transformer.h[1].mlp
        place = mlp.input.abs().sum(-1).argmax()
        PLACES[name](mlp.output, place)
        logits = model.lm_head.output.save()
    places = []
    hooks = {
        "transformer.h.1.mlp.input": lambda x: places.append(x.abs().sum(-1).argmax()),
        "transformer.h.1.mlp.output": lambda h: [PLACES[name](h, places[0]), None][1],
    }
    expected = with_hooks(net, hooks, ids).result.logits
    assert int(places[0]) > 0
    bitwise(logits, expected)
    moves(logits, gpt2.baseline)


def test_a_place_that_is_a_value_needs_no_look(model, ids):
    """In a scan a look would raise."""
    with model.scan(ids):
        mlp = model.transformer.h[1].mlp
        place = mlp.input.abs().sum(-1).argmax()
        mlp.output[:, place] = 0
        mlp.output[:, place, 3:5].mul_(2)
        assert tuple(mlp.output[:, place].shape) == (1, 32)


def test_a_place_that_is_a_value_is_found_anew_on_another_input(model, net, ids):
    with model.trace(ids) as tracer:
        mlp = model.transformer.h[1].mlp
        mlp.output[:, mlp.input.abs().sum(-1).argmax()] = 0
        model.lm_head.output.save("logits")
        assert tracer.plan().operations > 0
    assert "guard" not in str(tracer.graph)

    places = []
    hooks = {
        "transformer.h.1.mlp.input": lambda x: places.append(x.abs().sum(-1).argmax()),
        "transformer.h.1.mlp.output": lambda h: h.index_fill(1, places[-1], 0.0),
    }
    for other in (ids, torch.flip(ids, [1]), ids[:, 2:8]):
        expected = with_hooks(net, hooks, other).result.logits
        bitwise(tracer.graph.run(model, other)["logits"], expected)
    assert len(set(map(int, places))) > 1
