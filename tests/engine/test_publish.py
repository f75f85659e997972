"""A model as data: what a client makes of a card has the tree, shapes and facts of it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tests.engine.served import apply_query, client_of, shapes_by_hooks, told
from tests.families import zoo
from weft.engine.publish import answer, know
from weft.engine.standin import config_of, facts_of, skeleton_of
from weft.errors import MessageError, RecordingError, UnknownPathError, WeftError
from weft.families.forward import language_facts
from weft.families.loading import differences
from weft.kernels.aval import contiguous
from weft.testing import tiny_path
from weft.wire.messages import ApplyQuery, LanguageInputs, Layout, SignatureQuery, encode

FAMILIES = ("gpt2", "gpt_neox", "opt", "bloom", "llama", "qwen3", "gemma2", "mixtral")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def net(family):
    return zoo.build(family)


# The tree


def test_the_tree_is_the_models_own(net):
    stand_in = skeleton_of(told(know(net)))
    assert differences(net, stand_in) == []
    assert repr(stand_in) == repr(net)
    assert all(tensor.device.type == "meta" for tensor in stand_in.parameters())


def test_attributes_of_modules_are_there():
    net = zoo.build("gpt2")
    stand_in = skeleton_of(told(know(net)))
    for path in ("transformer.h.1.attn", "transformer.h.0.ln_1"):
        mine, theirs = stand_in.get_submodule(path), net.get_submodule(path)
        plain = {k: v for k, v in vars(theirs).items() if type(v) in (int, float, str)}
        assert plain
        assert {name: getattr(mine, name) for name in plain} == plain
    assert stand_in.lm_head.bias is None
    assert not stand_in.training


def test_containers_and_shared_modules_stay_what_they_are():
    shared = nn.Linear(3, 3, bias=False)
    net = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.ModuleList([shared])})
    stand_in = skeleton_of(told(know(net)))
    assert stand_in["a"][0] is stand_in["b"][0]
    assert len(stand_in["a"]) == 2
    assert list(stand_in) == ["a", "b"]
    assert repr(stand_in) == repr(net)


def test_a_stand_in_says_that_it_has_no_weights():
    stand_in = skeleton_of(told(know(nn.Linear(2, 2))))
    with pytest.raises(WeftError, match="its weights are on the server"):
        stand_in(torch.ones(1, 2))


# Shapes


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (1, 14), (3, 9), (2, 33)])
def test_sites_look_as_they_do_in_a_real_pass(net, size):
    _, client, _ = client_of(net)
    ids = torch.randint(0, zoo.VOCAB, size, generator=torch.Generator().manual_seed(1))
    signature = client.signatures.for_call((), {"input_ids": ids, "use_cache": False})
    for path, (shape, dtype) in shapes_by_hooks(net, input_ids=ids, use_cache=False).items():
        last = signature.site(path, "output", signature.calls(path) - 1)
        _, aval = last.tensors[0]
        assert (tuple(aval.shape), aval.dtype) == (shape, dtype), path


def test_a_kind_of_call_is_asked_for_once_and_no_pass_is_made():
    net = zoo.build("llama")
    here, client, answers = client_of(net)
    for length in (9, 12, 30, 57):
        ids = torch.ones(1, length, dtype=torch.long)
        client.signatures.for_call((), {"input_ids": ids, "use_cache": False})
    assert answers.asked == ["signature"]
    assert client.signatures.passes == 0 < here.signatures.passes


@pytest.mark.parametrize("name", FAMILIES)
def test_rules_tell_what_the_modules_give(name):
    net = zoo.build(name)
    _, client, answers = client_of(net)
    ruled = 0
    for path, module in net.named_modules():
        if module._modules or type(module).__name__ not in ("Linear", "Conv1D", "LayerNorm"):
            continue
        weight = module.weight
        width = weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[-1]
        x = torch.zeros(2, 5, width)
        _, aval = client.signatures.rules.apply(
            client.skeleton.get_submodule(path), path, (contiguous((2, 5, width), x.dtype),), {}
        ).leaves[0]
        with torch.no_grad():
            expected = module(x)
        assert (tuple(aval.shape), aval.dtype) == (tuple(expected.shape), expected.dtype)
        ruled += 1
    assert ruled
    assert answers.asked == []


def test_what_no_rule_tells_is_asked():
    net = zoo.build("gpt2")
    _, client, answers = client_of(net)
    path = "transformer.h.1.mlp"
    given = (contiguous((2, 5, 32), torch.float32),)
    found = client.signatures.rules.apply(client.skeleton.get_submodule(path), path, given, {})
    assert answers.asked == [path]
    with torch.no_grad():
        expected = net.get_submodule(path)(torch.zeros(2, 5, 32))
    assert tuple(found.leaves[0][1].shape) == tuple(expected.shape)
    client.signatures.rules.apply(client.skeleton.get_submodule(path), path, given, {})
    assert answers.asked == [path]


def test_arguments_that_a_module_cannot_take_are_refused_with_the_reason():
    net = zoo.build("gpt2")
    _, client, _ = client_of(net)
    path = "transformer.h.1.mlp"
    with pytest.raises(RecordingError, match=r"transformer\.h\.1\.mlp cannot take"):
        client.signatures.rules.apply(
            client.skeleton.get_submodule(path), path, (contiguous((2, 31), torch.float32),), {}
        )


# Facts and configuration


def test_facts_and_configuration_are_the_models_own(net):
    told_of = told(know(net))
    facts, expected = facts_of(told_of), language_facts(net.config, type(net))
    for name in ("model_type", "vocab", "positions", "pad", "takes", "takes_any", "attention"):
        assert getattr(facts, name) == getattr(expected, name)
    config = config_of(told_of)
    assert config.num_hidden_layers == net.config.num_hidden_layers == zoo.LAYERS
    assert config.hidden_size == net.config.hidden_size
    assert config.vocab_size == config.to_dict()["vocab_size"] == zoo.VOCAB
    with pytest.raises(AttributeError, match="no 'nothing'"):
        _ = config.nothing
    with pytest.raises(AttributeError, match="cannot be changed"):
        config.vocab_size = 3


def test_parameters_and_dtype_are_counted():
    net = zoo.build("gpt2", torch.bfloat16)
    info = told(know(net)).info
    assert info.parameters == sum(tensor.numel() for tensor in net.parameters())
    assert (info.dtype, info.family, info.class_name) == ("bfloat16", "language", "GPT2LMHeadModel")


def test_no_path_of_the_machine_is_in_a_card(tmp_path):
    folder = tmp_path / "secret-place"
    zoo.build("llama").save_pretrained(folder)
    for source in (str(folder), tiny_path()):
        data = encode(told(know(source)), "json").decode()
        assert "secret-place" not in data
        assert tiny_path() not in data
        assert json.loads(data)["info"]["family"] == "language"
    net = zoo.build("llama")
    net.config.somebodys_cache = "/home/ann/cache"
    net.note = "C:\\Users\\ann"
    assert "ann" not in encode(told(know(net)), "json").decode()


# Questions that lead nowhere


@pytest.mark.parametrize(
    "path",
    ["__class__", "forward", "transformer.h.0.__init__", "transformer..h", "transformer.h.9", "."],
)
def test_a_path_reads_no_attribute(path):
    here = know(zoo.build("gpt2"))
    query = apply_query(here, path, (contiguous((1, 32), torch.float32),), {})
    with pytest.raises(UnknownPathError):
        answer(here, query)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dtype="float32", shape=(2**62,), stride=(1,)),
        Layout(dtype="float32", shape=(2, 3), stride=(1,)),
        Layout(dtype="float32", shape=(2,), stride=(2**62,)),
        Layout(dtype="float32", shape=(2,), stride=(1,), offset=2**62),
        Layout(dtype="load", shape=(2,), stride=(1,)),
        Layout(dtype="Tensor", shape=(2,), stride=(1,)),
        Layout(dtype="float32", shape=(1,) * 65, stride=(1,) * 65),
    ],
)
def test_a_layout_of_no_tensor_is_refused(layout):
    here = know(nn.Linear(2, 2))
    good = apply_query(here, "", (contiguous((1, 2), torch.float32),), {})
    query = ApplyQuery(
        model="m", fingerprint=here.fingerprint, path="", layouts=(layout,), args=good.args
    )
    with pytest.raises(MessageError):
        answer(here, query)


def test_arguments_may_only_name_layouts_that_are_there():
    here = know(nn.Linear(2, 2))
    good = apply_query(here, "", (contiguous((1, 2), torch.float32),), {})
    query = ApplyQuery(model="m", fingerprint=here.fingerprint, path="", layouts=(), args=good.args)
    with pytest.raises(MessageError, match="layout 0"):
        answer(here, query)


def test_inputs_of_a_question_are_checked():
    here = know(zoo.build("gpt2"))
    query = SignatureQuery(
        model="m", fingerprint=here.fingerprint, inputs=LanguageInputs(given=("input_ids",))
    )
    with pytest.raises(MessageError, match="input_ids"):
        answer(here, query)
