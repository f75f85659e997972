"""Fitting, the boxes in which a fit is trusted, and tables as bytes."""

from __future__ import annotations

import random
import zlib

import msgspec
import pytest
import torch
from torch import nn

from tests.trace.oracle import check
from tests.trace.test_signature_models import inputs, skeleton
from weft.errors import GraphError, RecordingError
from weft.kernels.aval import Aval, contiguous
from weft.signatures.expressions import Size, Sum, fit, fit_number
from weft.signatures.learn import Facts, Row, Table
from weft.signatures.regions import Region
from weft.signatures.signature import Signatures
from weft.signatures.structure import Plain

POINTS = [(2, 9), (3, 20), (7, 67), (2, 67)]


@pytest.mark.parametrize(
    "formula",
    [
        lambda b, s: 768,
        lambda b, s: s,
        lambda b, s: b * s,
        lambda b, s: 12 * s * s,
        lambda b, s: 4 * b * s * s,
        lambda b, s: s + 1,
        lambda b, s: 2 * s - 1,
        lambda b, s: b * s + 2 * b,
        lambda b, s: s * (s + 1) // 2,
    ],
)
def test_numbers_that_have_a_formula(formula) -> None:
    found = fit_number([formula(*point) for point in POINTS], POINTS)
    for point in [(4, 11), (5, 40), (100, 3)]:
        assert (found if type(found) is int else found.at(point)) == formula(*point)


@pytest.mark.parametrize(
    "formula",
    [
        lambda b, s: min(s, 16),
        lambda b, s: -(-s // 8) * 8,
        lambda b, s: s * s * s,
        lambda b, s: s + b + 5,
        lambda b, s: random.Random(s).randrange(1000),
    ],
)
def test_numbers_that_have_none(formula) -> None:
    assert fit_number([formula(*point) for point in POINTS], POINTS) is None


def test_a_fraction_is_an_error_where_it_is_no_integer() -> None:
    half = fit_number([4, 10], [(1, 8), (1, 20)])
    assert half == Sum(((1, 0, 1),), 2)
    with pytest.raises(ArithmeticError):
        half.at((1, 9))  # type: ignore[union-attr]


def table(batch: int, length: int, window: int = 10**9, extra: object = None) -> Table:
    """A pass of a made-up model that changes its structure beyond a window."""
    inside = length < window
    leaf = contiguous((batch, min(length, window), 8), torch.float32)
    what = (leaf, Plain(length), Plain(inside), Plain(extra))
    keys = ((0,), (1,), (2,), (3,))
    facts = (Facts(0, False, False), None, None, None)
    tree = ("tuple", (0, 1, 2, 3), (None, None, None, None))
    return Table((Row("h", "output", 0, tree, keys, what, facts),), {})


def test_passes_of_other_form_have_no_formulas() -> None:
    assert fit({(1, 9): table(1, 9, 20), (1, 20): table(1, 20, 20)}) is None
    formulas = fit({(1, 9): table(1, 9), (1, 20): table(1, 20), (1, 67): table(1, 67)})
    assert formulas is not None
    assert formulas.row(0, (1, 30)) == table(1, 30).rows[0]
    assert isinstance(formulas.rows[0].what[1], Size)  # type: ignore[union-attr]


@pytest.mark.parametrize("window", [2, 6, 7, 64, 70, 10**9])
def test_regions_are_right_on_both_sides_of_any_window(window: int) -> None:
    asked: list[tuple[int, int]] = []

    def probe(point: tuple[int, int]) -> Table:
        asked.append(point)
        return table(*point, window)

    region = Region(probe, (1, 2))
    draw = random.Random(window)
    derived = 0
    for _ in range(200):
        point = 1, draw.randrange(2, 120)
        formulas = region.find(point) or region.reach(point)
        if formulas is None:
            region.add(point, table(*point, window))
        else:
            derived += 1
            assert formulas.row(0, point) == table(*point, window).rows[0], (point, asked)
    assert derived > 150
    assert len(asked) < 20


def test_regions_give_up_on_what_has_no_formula() -> None:
    asked: list[tuple[int, int]] = []

    def shaky(point: tuple[int, int]) -> Table:
        asked.append(point)
        return table(*point, extra=str(point))

    region = Region(shaky, (2, 2))
    for length in range(3, 60):
        point = 4, length
        assert region.find(point) is None
        assert region.reach(point) is None
        region.add(point, shaky(point))
    assert len(asked) < 57 + 40


def test_a_probe_that_fails_bounds_the_region() -> None:
    region = Region(lambda point: table(*point) if point[1] <= 40 else None, (1, 2))
    for length in (9, 20, 15):
        region.add((1, length), table(1, length))
    assert region.find((1, 18)) is not None
    assert region.reach((1, 39)) is not None
    assert region.reach((1, 41)) is None


def test_sites_without_a_formula_cost_an_exact_pass_and_are_right() -> None:
    class Rounding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pad = nn.Identity()
            self.body = nn.Identity()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            wide = self.pad(torch.zeros(ids.shape[0], -(-ids.shape[1] // 8) * 8))
            return self.body(wide.sum(1)[:, None] + ids)

    signatures, net = Signatures(Rounding), Rounding()
    for length in (9, 20, 23, 24, 25, 50):
        args = (torch.randint(0, 9, (2, length)),)
        check(signatures.for_call(args, {}), net, args, {})
    before = signatures.passes
    sig = signatures.for_call((torch.zeros(2, 33, dtype=torch.long),), {})
    assert dict(sig.site("body", "output").leaves)[()].shape == (2, 33)
    assert signatures.passes == before
    assert dict(sig.site("pad", "output").leaves)[()].shape == (2, 40)
    assert signatures.passes == before + 1


def learnt_skeleton(name: str) -> Signatures:
    bare = skeleton(name)
    signatures = Signatures(lambda: bare)
    for kind in ("plain", "full", "padded"):
        for batch, length in ((1, 9), (1, 20), (2, 9), (3, 20), (1, 1)):
            signatures.for_call(*inputs(kind, batch, length))
    return signatures


def nobody() -> nn.Module:
    raise RecordingError("there is no model here")


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mixtral"])
def test_bytes_say_the_same_without_a_model(name: str) -> None:
    here = learnt_skeleton(name)
    there = Signatures(nobody)
    there.add_bytes(here.to_bytes())
    for kind in ("plain", "full", "padded"):
        for batch, length in ((1, 1), (1, 9), (1, 40), (3, 20), (2, 15)):
            call = inputs(kind, batch, length)
            one, other = here.for_call(*call), there.for_call(*call)
            assert one.order == other.order
            for name_ in one.order:
                a, b = one.site(*name_), other.site(*name_)
                assert (a.index, a.leaves, a.facts, a.tree) == (b.index, b.leaves, b.facts, b.tree)
    assert there.to_bytes() == here.to_bytes()
    with pytest.raises(RecordingError, match="no model here"):
        there.for_call(*inputs("plain", 1, 5000))


def test_bytes_of_a_real_size_are_few() -> None:
    bare = skeleton("gpt2", n_layer=12)
    signatures = Signatures(lambda: bare)
    for batch, length in ((1, 9), (1, 20), (2, 9), (3, 20)):
        signatures.for_call(*inputs("padded", batch, length))
    assert len(signatures.to_bytes()) < 6000


def test_a_container_class_that_is_not_here_becomes_a_record() -> None:
    here = learnt_skeleton("gpt2")
    raw = zlib.decompress(here.to_bytes()).replace(b"CausalLMOutputWithCross", b"NeverHeardOfThis")
    there = Signatures(nobody)
    there.add_bytes(zlib.compress(raw))
    site = there.for_call(*inputs("plain", 1, 9)).site("", "output")
    out = site.rebuild([what for _, what in site.leaves])
    assert type(out).__name__ == "Record"
    assert isinstance(out.logits, Aval)
    assert out["logits"] is out[0] is out.logits


@pytest.mark.parametrize("seed", range(30))
def test_other_bytes_are_refused(seed: int) -> None:
    data = learnt_bytes()
    draw = random.Random(seed)
    raw = bytearray(zlib.decompress(data))
    for _ in range(1 + seed % 4):
        raw[draw.randrange(len(raw))] = draw.randrange(256)
    there = Signatures(nobody)
    try:
        there.add_bytes(zlib.compress(bytes(raw)))
    except GraphError:
        return
    sig = None
    try:
        sig = there.for_call(*inputs("plain", 2, 30))
        for name in sig.order:
            sig.site(*name)
    except (RecordingError, GraphError, LookupError):
        pass


def test_a_bomb_and_another_version_are_refused() -> None:
    signatures = Signatures(nobody)
    for data in (b"", b"nonsense", zlib.compress(b" " * (65 << 20))):
        with pytest.raises(GraphError):
            signatures.add_bytes(data)
    tables = msgspec.json.decode(zlib.decompress(learnt_bytes()))
    tables[0] = 99
    with pytest.raises(GraphError, match="version 99"):
        signatures.add_bytes(zlib.compress(msgspec.json.encode(tables)))


_BYTES: list[bytes] = []


def learnt_bytes() -> bytes:
    """A table to spoil."""
    if not _BYTES:
        _BYTES.append(learnt_skeleton("gpt2").to_bytes())
    return _BYTES[0]
