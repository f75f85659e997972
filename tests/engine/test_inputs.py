"""From the inputs of a message to a call: the one that the user's own machine would make."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families import zoo
from tests.run.nets import Chain
from weft.engine.inputs import call_of
from weft.engine.known import Known
from weft.engine.publish import know
from weft.errors import InputError, MessageError, UnknownOptionError
from weft.families.prepare import prepare_language
from weft.graph.frame import Frame
from weft.graph.node import Complex, Graph, Map, Name, Ref, Seq, Shape, Slice
from weft.kernels.frames import to_frame
from weft.testing.same import bitwise
from weft.wire.messages import LanguageInputs, LanguageOptions, PlainInputs, Submit, decode, encode

IDS = torch.tensor(zoo.tokens(9, seed=1))


@pytest.fixture(scope="module")
def gpt2() -> Known:
    return know(zoo.build("gpt2"))


@pytest.fixture(scope="module")
def plain() -> Known:
    return know(Chain())


def language(known: Known, options: LanguageOptions | None = None, **tensors: torch.Tensor) -> Any:
    given = {name: to_frame(tensor) for name, tensor in tensors.items()}
    inputs = LanguageInputs(given=tuple(given), options=options or LanguageOptions())  # type: ignore[arg-type]
    return call_of(inputs, given, known)


LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
TENSORS: dict[str, dict[str, torch.Tensor]] = {
    "ids": {"input_ids": IDS},
    "two rows": {"input_ids": IDS.repeat(2, 1)},
    "one row without a batch": {"input_ids": IDS[0]},
    "narrow ids": {"input_ids": IDS.int()},
    "padding": {"input_ids": IDS, "attention_mask": LEFT},
    "a mask of truth values": {"input_ids": IDS, "attention_mask": LEFT.bool()},
    "a mask that masks nothing": {"input_ids": IDS, "attention_mask": torch.ones(1, 9)},
    "positions": {"input_ids": IDS, "position_ids": torch.arange(9)[None] + 3},
    "embeddings": {"inputs_embeds": torch.linspace(-1, 1, 288).reshape(1, 9, 32)},
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_call_is_the_one_that_is_made_at_home(gpt2, name):
    given = TENSORS[name]
    got = language(gpt2, **given)
    assert gpt2.facts is not None
    expected = prepare_language(None, None, gpt2.facts, tensors=dict(given))
    assert got.args == expected.args and got.kwargs.keys() == expected.kwargs.keys()
    for key, value in expected.kwargs.items():
        bitwise(got.kwargs[key], value) if isinstance(value, torch.Tensor) else None
        assert isinstance(value, torch.Tensor) or got.kwargs[key] == value
    assert (got.batch, got.length, got.lengths) == (
        expected.batch,
        expected.length,
        expected.lengths,
    )
    gpt2.skeleton(*got.args, **got.kwargs)


def test_options_reach_the_forward(gpt2):
    call = language(gpt2, LanguageOptions(output_hidden_states=True), input_ids=IDS)
    assert call.kwargs["output_hidden_states"] is True


def test_an_option_that_the_model_does_not_have(gpt2):
    with pytest.raises(UnknownOptionError):
        language(gpt2, LanguageOptions(output_router_logits=True), input_ids=IDS)


REFUSED: dict[str, dict[str, torch.Tensor]] = {
    "ids and embeddings": {"input_ids": IDS, "inputs_embeds": torch.ones(1, 9, 32)},
    "no tokens": {"attention_mask": LEFT},
    "an id beyond the vocabulary": {"input_ids": IDS + zoo.VOCAB},
    "an id below zero": {"input_ids": -IDS},
    "ids that are no whole numbers": {"input_ids": IDS.float()},
    "ids that are complex": {"input_ids": IDS.to(torch.complex64)},
    "ids that are truth values": {"input_ids": IDS.bool()},
    "no position": {"input_ids": IDS[:, :0]},
    "no row": {"input_ids": IDS[:0]},
    "too many dimensions": {"input_ids": IDS[None, None]},
    "one number": {"input_ids": IDS[0, 0]},
    "longer than the model": {"input_ids": IDS.repeat(1, 20)},
    "a mask of another shape": {"input_ids": IDS, "attention_mask": LEFT[:, :5]},
    "a mask with other numbers": {"input_ids": IDS, "attention_mask": LEFT * 2},
    "a mask of NaN": {"input_ids": IDS, "attention_mask": torch.full((1, 9), float("nan"))},
    "a mask that masks all": {"input_ids": IDS, "attention_mask": LEFT * 0},
    "complex positions": {"input_ids": IDS, "position_ids": IDS.to(torch.complex64)},
    "positions below zero": {"input_ids": IDS, "position_ids": IDS * 0 - 1},
    "positions beyond the table": {"input_ids": IDS, "position_ids": IDS * 0 + 2**40},
    "positions of another shape": {"input_ids": IDS, "position_ids": IDS[:, :3]},
    "token types, which it has none of": {"input_ids": IDS, "token_type_ids": IDS * 0 + 1},
    "whole embeddings": {"inputs_embeds": torch.ones(1, 9, 32, dtype=torch.int64)},
    "embeddings without a width": {"inputs_embeds": torch.ones(9)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_language_model_cannot_take(gpt2, name):
    try:
        call = language(gpt2, **REFUSED[name])
    except (InputError, UnknownOptionError):
        return
    assert name == "token types, which it has none of" and "token_type_ids" in call.kwargs


def test_tensors_are_exactly_those_given(gpt2):
    frame = to_frame(IDS)
    inputs = LanguageInputs(given=("input_ids",))
    for tensors in ({}, {"input_ids": frame, "attention_mask": frame}, {"in.0": frame}):
        with pytest.raises(MessageError):
            call_of(inputs, tensors, gpt2)
    with pytest.raises(MessageError, match="twice"):
        twice = LanguageInputs(given=("input_ids", "input_ids"))
        call_of(twice, {"input_ids": frame}, gpt2)


def test_a_family_takes_its_own_inputs_only(gpt2, plain):
    with pytest.raises(InputError, match="takes plain inputs"):
        language(plain, input_ids=IDS)
    with pytest.raises(InputError, match="takes language inputs"):
        call_of(PlainInputs(), {}, gpt2)


# Any other module

X = torch.linspace(-1, 1, 6).reshape(2, 3)
FRAMES = {"in.0": to_frame(X), "in.1": to_frame(X > 0)}


def test_arguments_of_any_module(plain):
    inner = Map(("x", "list"), (Ref(1), Seq("list", (1, 2.5, None, True, "text"))))
    inputs = PlainInputs(
        args=(Ref(0), Seq("tuple", (Ref(0), inner)), Slice(1, None, 2), Name("float", "-inf")),
        kwargs=(("scale", 2), ("mask", Ref(1))),
    )
    call = call_of(decode(encode(_submit(inputs)), Submit).inputs, FRAMES, plain)
    bitwise(call.args[0], X)
    assert call.args[1][0] is call.args[0]  # one Ref, one tensor
    bitwise(call.args[1][1]["x"], X > 0)
    assert call.args[1][1]["list"] == [1, 2.5, None, True, "text"]
    assert call.args[2:] == (slice(1, None, 2), float("-inf"))
    assert call.kwargs["scale"] == 2 and call.kwargs["mask"] is call.args[1][1]["x"]
    assert call.batch == 2


def _submit(inputs: PlainInputs) -> Submit:
    digest = "0" * 64
    return Submit(
        protocol=1, request_id="a", model="m", fingerprint=digest, graph=Graph(()), inputs=inputs
    )


def _nested(depth: int) -> Any:
    arg: Any = 1
    for _ in range(depth):
        arg = Seq("list", (arg,))
    return arg


ODD: dict[str, PlainInputs] = {
    "a tensor that is not there": PlainInputs(args=(Ref(2),)),
    "a tensor before the first": PlainInputs(args=(Ref(-1),)),
    "a second result": PlainInputs(args=(Ref(0, 1), Ref(1))),
    "a tensor that is not used": PlainInputs(args=(Ref(0),)),
    "a keyword twice": PlainInputs(args=(Ref(0), Ref(1)), kwargs=(("a", 1), ("a", 2))),
    "a long keyword": PlainInputs(args=(Ref(0), Ref(1)), kwargs=(("a" * 1000, 1),)),
    "a dtype": PlainInputs(args=(Ref(0), Ref(1), Name("dtype", "float32"))),
    "a module": PlainInputs(args=(Ref(0), Ref(1), Name("module", "os"))),
    "a size": PlainInputs(args=(Ref(0), Ref(1), Seq("size", (1, 2)))),
    "a shape": PlainInputs(args=(Ref(0), Ref(1), Shape(Ref(0)))),
    "a set": PlainInputs(args=(Ref(0), Ref(1), Seq("set", (1, 2)))),
    "a complex number": PlainInputs(args=(Ref(0), Ref(1), Complex(1.0, 2.0))),
    "keys without values": PlainInputs(args=(Ref(0), Ref(1), Map(("a",), ()))),
    "a number beyond 64 bits": PlainInputs(args=(Ref(0), Ref(1), 2**64)),
    "a deep argument": PlainInputs(args=(Ref(0), Ref(1), _nested(100))),
}


@pytest.mark.parametrize("name", ODD)
def test_arguments_that_no_module_gets(plain, name):
    with pytest.raises(MessageError):
        call_of(ODD[name], FRAMES, plain)


def test_no_tensor_is_shared_with_the_message(plain):
    data = bytearray(X.numpy().tobytes())
    frame = Frame("float32", (2, 3), memoryview(data))
    call = call_of(PlainInputs(args=(Ref(0),)), {"in.0": frame}, plain)
    call.args[0].mul_(0)
    assert bytes(data) == X.numpy().tobytes()
