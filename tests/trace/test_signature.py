"""Signatures of modules made by hand: odd structures, sharing, overwriting, and what cannot be."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from tests.leftovers import fewest, objects, set_older_aside
from tests.trace.oracle import check
from weft.errors import RecordingError
from weft.kernels.aval import aval_of, contiguous
from weft.signatures.signature import Opaque, Plain, Signature, Signatures

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Parts:
    first: Any
    second: Any = None


class Twice(nn.Module):
    """Calls one module twice, one never, and one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.same = self.body
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.body(x)))


class Giver(nn.Module):
    """Gives its input in all kinds of structures."""

    def forward(self, x: torch.Tensor, *, kind: str = "tuple") -> Any:
        y = x * 2
        return {
            "tuple": (x, None, [y, 3], 2.5, True, "text"),
            "dict": {"a": x, 7: y, "more": {"b": (x.T,)}},
            "ordered": OrderedDict(z=x, a=y),
            "dataclass": Parts(x, Parts(y)),
            "named": Pair(x, y),
            "returned": torch.max(x, dim=1),
            "none": None,
            "opaque": (x, torch.device("cpu"), {1, 2}),
            "empty": ((), {}, x),
        }[kind]


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.giver = Giver()

    def forward(self, x: torch.Tensor, kind: str) -> Any:
        return self.giver(x, kind=kind)


class Overwriter(nn.Module):
    """Writes in place: into an activation, a view of one, an input and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        h = self.one(x)
        g = self.two(h)
        self.act(g)
        h[:, 0].add_(1)
        mask[0] = 5
        self.count += 1
        return h.view(-1), g.view(-1), self.count, mask


class Branch(nn.Module):
    """Decides by the numbers of its weights: cannot be faked."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        kept = h[h[:, 0] > 0]
        return self.b(kept) if len(kept) else h


class Careless(nn.Module):
    """Keeps what it sees, replaces a buffer, and fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.last: torch.Tensor | None = None
        self.body = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, fail: bool = False) -> torch.Tensor:
        self.last = self.body(x)
        self.scale = self.last.mean()
        self.extra = [self.last]
        if fail:
            raise KeyError("told to")
        return self.last


def learnt(net: nn.Module, *args: Any, **kwargs: Any) -> Signature:
    return Signatures(lambda: net).for_call(args, kwargs)


def test_called_twice_never_and_under_two_names() -> None:
    net, x = Twice(), torch.randn(3, 4)
    sig = learnt(net, x)
    check(sig, net, (x,), {})
    assert (sig.calls("body"), sig.calls("unused"), sig.calls("same")) == (2, 0, 2)
    assert sig.site("same", "output", 1) is not None
    assert sig.site("body", "output", 0).index < sig.site("body", "inputs", 1).index
    for missing in (("unused", "output", 0), ("body", "output", 2), ("nothing", "inputs", 0)):
        with pytest.raises(LookupError):
            sig.site(*missing)


@pytest.mark.parametrize(
    "kind",
    ["tuple", "dict", "ordered", "dataclass", "named", "returned", "none", "opaque", "empty"],
)
def test_structures(kind: str) -> None:
    net, x = Holder(), torch.randn(3, 4)
    check(learnt(net, x, kind), net, (x, kind), {})


def test_leaves_are_named_as_sites_name_them() -> None:
    site = learnt(Holder(), torch.randn(3, 4), "dict").site("giver", "output")
    assert [leaf for leaf, _ in site.leaves] == [("a",), (7,), ("more", "b", 0)]
    inputs = learnt(Holder(), torch.randn(3, 4), "dict").site("giver", "inputs")
    assert [leaf for leaf, _ in inputs.leaves] == [(0, 0), (1, "kind")]
    assert inputs.leaves[1][1] == Plain("dict")


def test_opaque_and_plain_leaves() -> None:
    site = learnt(Holder(), torch.randn(3, 4), "opaque").site("giver", "output")
    assert [str(what) for _, what in site.leaves[1:]] == ["device", "set"]
    assert isinstance(site.leaves[1][1], Opaque)
    assert Plain(True) != Plain(1)


def test_overwritten_shared_and_tied() -> None:
    net, x, mask = Overwriter(), torch.randn(3, 4), torch.zeros(3, dtype=torch.long)
    sig = learnt(net, x, mask)
    check(sig, net, (x, mask), {})
    assert mask.sum() == 0
    assert net.count.sum() == 3, "only the real pass of `check` counts"
    one, two = sig.site("one", "output").facts[0], sig.site("two", "output").facts[0]
    assert one is not None and two is not None
    assert one.overwritten and two.overwritten and one.group != two.group
    assert sig.site("two", "inputs").facts[0] == one


def test_inputs_that_share_a_storage() -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    base = torch.randn(4, 3)
    signatures = Signatures(Two)
    shared = signatures.for_call((base[:2], base[2:]), {}).site("", "inputs").facts
    apart = signatures.for_call((base[:2], base[2:].clone()), {}).site("", "inputs").facts
    assert shared[0].group == shared[1].group  # type: ignore[union-attr]
    assert apart[0].group != apart[1].group  # type: ignore[union-attr]
    ids = torch.arange(8).view(2, 4)
    check(signatures.for_call((ids, ids), {}), Two(), (ids, ids), {})


def test_a_forward_that_cannot_be_faked_needs_its_weights() -> None:
    net, x = Branch(), torch.randn(5, 4)
    with pytest.raises(RecordingError, match="DynamicOutputShape"):
        learnt(net, x)
    sig = Signatures(lambda: net, real=lambda: net).for_call((x,), {})
    kept = int((net.a(x)[:, 0] > 0).sum())
    check(sig, net, (x,), {})
    if kept:
        assert dict(sig.site("b", "inputs").leaves)[0, 0].shape == (kept, 4)


def test_a_real_pass_keeps_random_state_and_running_statistics() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.drop(self.norm(x))
            return x[x > 0]

    net, x = Net(), torch.randn(5, 4)
    state, numbers = torch.get_rng_state(), net.norm.running_mean.clone()  # type: ignore[union-attr]
    Signatures(lambda: net, real=lambda: net).for_call((x,), {})
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(net.norm.running_mean, numbers)  # type: ignore[arg-type]
    assert net.norm.num_batches_tracked == 0


def test_an_error_of_the_model_is_named_and_leaves_nothing_behind() -> None:
    net = Careless()
    scale, before = net.scale, dict(vars(net))
    for fail in (False, True):
        signatures = Signatures(lambda: net, real=lambda: net)
        if fail:
            with pytest.raises(RecordingError, match=r"KeyError.*told to"):
                signatures.for_call((torch.randn(2, 4),), {"fail": True})
        else:
            signatures.for_call((torch.randn(2, 4),), {})
        assert net.scale is scale
        assert vars(net).keys() == before.keys()
        assert net.last is None
        for module in net.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._forward_hooks_with_kwargs
            assert not module._forward_pre_hooks_with_kwargs


def test_numbers_of_masks_decide_where_the_model_asks_for_them() -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return x if mask.all() else self.inner(x)

    signatures = Signatures(Asking)
    x, mask = torch.randn(2, 5), torch.ones(2, 5, dtype=torch.long)
    assert signatures.for_call((x, mask), {}).calls("inner") == 0
    mask[0, 1] = 0
    assert signatures.for_call((x, mask), {}).calls("inner") == 1
    assert signatures.for_call((x, torch.ones_like(mask)), {}).calls("inner") == 0
    assert signatures.passes == 2


def test_looks_at_ids_count_only_if_something_hangs_on_them() -> None:
    """A model that asks about its ids and does nothing with the answer, and one that does."""

    class Asking(nn.Module):
        def __init__(self, obeys: bool, nested: bool = False) -> None:
            super().__init__()
            self.obeys, self.nested = obeys, nested
            self.inner = nn.Identity()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            found = 7 in ids and (not self.nested or 8 in ids)
            return self.inner(ids) if found and self.obeys else ids

    draws = [torch.tensor([row]) for row in ([3, 4, 5], [3, 7, 5], [6, 7, 8], [9, 9, 8])]
    for obeys, nested in ((False, False), (True, False), (True, True)):
        net = Asking(obeys, nested)
        signatures = Signatures(lambda net=net: net)
        for ids in draws:
            check(signatures.for_call((ids,), {}), net, (ids,), {})
        assert (signatures.passes == 2) is not obeys


def test_positions_and_other_numbers() -> None:
    class Longest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, positions: torch.Tensor) -> torch.Tensor:
            return self.inner(torch.zeros(int(positions.max()) + 1))

    signatures, net = Signatures(Longest), Longest()
    for numbers in ([[0, 1, 2]], [[0, 7, 2]], [[0, 1, 2, 3, 4]], [[0, 1, 2, 3]], [[0, 0, 9, 3]]):
        args = (torch.tensor(numbers),)
        check(signatures.for_call(args, {}), net, args, {})


def test_nothing_is_kept_alive() -> None:
    def fakes() -> int:
        net, x = Overwriter(), torch.randn(3, 4)
        ids = torch.zeros(3, dtype=torch.long)
        signatures = Signatures(Overwriter)
        set_older_aside()
        sig = signatures.for_call((x, ids), {})
        watched = [weakref.ref(t) for t in (x, ids, net)]
        del x, ids, net
        gc.collect()
        assert all(ref() is None for ref in watched)
        assert sig.calls("one") == 1
        return objects(names=("FakeTensor", "FakeTensorMode"))

    assert fewest(fakes) == 0


def test_eight_threads_learn_once() -> None:
    net = Twice()
    signatures = Signatures(lambda: net)
    sizes = [2, 3, 4, 5] * 8
    found: list[tuple[int, Signature]] = []
    failed: list[Exception] = []

    def work(mine: list[int]) -> None:
        try:
            for n in mine:
                found.append((n, signatures.for_call((torch.zeros(n, 4),), {})))
        except Exception as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=work, args=(sizes[k:],)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for n, sig in found:
        assert dict(sig.site("head", "output").leaves)[()].shape == (n, 2)
    assert signatures.passes <= 5


def test_another_thread_s_forward_is_not_seen() -> None:
    inside, go = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not inside.is_set():
                inside.set()
                assert go.wait(20)
            return self.body(x)

    net = Slow()
    out: list[Signature] = []
    thread = threading.Thread(target=lambda: out.append(learnt(net, torch.zeros(2, 4))))
    thread.start()
    assert inside.wait(20)
    net(torch.zeros(9, 4))
    go.set()
    thread.join()
    assert out[0].calls("body") == 1
    assert dict(out[0].site("body", "output").leaves)[()].shape == (2, 4)


def test_a_signature_inside_a_block_and_under_modes() -> None:
    """Whoever asks has modes of their own: recording, inference, fake, default device."""
    net, x = Twice(), torch.zeros(3, 4)
    with torch.inference_mode(), torch.device("cpu"):
        sig = learnt(net, x)
    check(sig, net, (x,), {})


def test_apply_of_plain_layers_agrees_with_running_them() -> None:
    layers = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 6),
            "norm": nn.LayerNorm(4),
            "rms": nn.RMSNorm(4),
            "gelu": nn.GELU(),
            "drop": nn.Dropout(0.1),
            "identity": nn.Identity(),
            "flatten": nn.Flatten(0),
            "sequence": nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)),
        }
    ).eval()
    sig = learnt(Twice(), torch.zeros(3, 4))
    whole, part = torch.zeros(2, 5, 4), torch.zeros(2, 5, 8)[..., ::2]
    for name, layer in layers.items():
        for x in (whole, part, whole.transpose(0, 1), whole[:, -1], whole[0, 0]):
            result = sig.apply(layer, name, (aval_of(x),), {})
            ((leaf, what),) = result.leaves
            real = layer(x)
            assert leaf == ()
            assert what is aval_of(real), (name, x.shape, x.stride())
            shares = real.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            assert result.alias == (0,) if shares else (None,)


def test_apply_of_embeddings_and_of_whole_modules() -> None:
    ids, net = contiguous((2, 5), torch.int64), Holder()
    sig = learnt(Twice(), torch.zeros(3, 4))
    embedded = sig.apply(nn.Embedding(9, 4), "wte", (ids,), {})
    assert embedded.leaves == (((), contiguous((2, 5, 4), torch.float32)),)
    x = contiguous((3, 4), torch.float32)
    result = sig.apply(net, "net", (x,), {"kind": "tuple"})
    assert result.alias == (0, None, None, None, None, None, None)
    assert result.rebuild([1, None, 2, 3, 2.5, True, "text"]) == (
        1,
        None,
        [2, 3],
        2.5,
        True,
        "text",
    )
    weight = sig.apply(_Weight(), "w", (x,), {})
    assert weight.alias == (-1,)


class _Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight[None]


def test_apply_refuses_what_the_module_cannot_take() -> None:
    sig = learnt(Twice(), torch.zeros(3, 4))
    with pytest.raises(RecordingError, match="lm_head cannot take"):
        sig.apply(nn.Linear(4, 2), "lm_head", (contiguous((2, 5), torch.float32),), {})
    with pytest.raises(RecordingError, match="lm_head cannot take"):
        sig.apply(nn.Linear(4, 2), "lm_head", (contiguous((2, 4), torch.bfloat16),), {})
