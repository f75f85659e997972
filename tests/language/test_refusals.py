"""What a block refuses: with the reason, the user's line, and a way out. Never silently wrong."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import weft
from tests.families import zoo
from tests.language.hooks import with_hooks
from weft.errors import (
    InputError,
    NotReachedError,
    NotSavedError,
    OutsideTraceError,
    RecordingError,
    UnknownOptionError,
    UnknownPathError,
    UnsupportedOperationError,
    WeftError,
)
from weft.testing.same import bitwise


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def autocast(h):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return h @ h.mT


UNSEEN = {
    "vmap": lambda h: torch.func.vmap(torch.sum)(h),
    "grad": lambda h: torch.func.grad(torch.sum)(h),
    "jacrev": lambda h: torch.func.jacrev(torch.sum)(h),
    "checkpoint": lambda h: checkpoint(torch.sin, h, use_reentrant=False),
    "reentrant checkpoint": lambda h: checkpoint(torch.sin, h, use_reentrant=True),
    "autocast": autocast,
    "pickle": pickle.dumps,
    "torch.save": lambda h: torch.save(h, "/dev/null"),
    "out=": lambda h: torch.add(h, h, out=torch.zeros(1, 9, 32)),
    "grad_fn": lambda h: h.grad_fn,
    "data_ptr": lambda h: h.data_ptr(),
    "as_strided": lambda h: h.as_strided((2,), (1,)),
    "storage": lambda h: h.untyped_storage(),
    "map_": lambda h: h.map_(h, lambda x, y: x),
    "apply_": lambda h: h.apply_(lambda x: x),
    "hook": lambda h: h.register_hook(lambda g: g),
    "resize_": lambda h: h.resize_(3),
    "set data": lambda h: setattr(h, "data", h),
    "unsqueeze_": lambda h: h.unsqueeze_(0),
    "dlpack": lambda h: torch.from_dlpack(h),
    "sparse": lambda h: h.to_sparse(),
    "an object": lambda h: h.new_tensor(object()),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_cannot_be_recorded_raises_at_the_line(model, ids, name):
    with pytest.raises((RecordingError, TypeError)) as caught, model.trace(ids):
        UNSEEN[name](model.transformer.h[1].output)
    if isinstance(caught.value, WeftError):
        assert __file__ in str(caught.value.line)
        assert caught.value.fix


@pytest.mark.parametrize("name", ["data_ptr", "as_strided", "map_", "resize_", "out="])
def test_an_unsupported_operation_names_the_reason(model, ids, name):
    with pytest.raises(RecordingError) as caught, model.trace(ids):
        UNSEEN[name](model.transformer.h[1].output)
    if isinstance(caught.value, UnsupportedOperationError):
        assert "cannot be recorded: " in caught.value.message


def test_the_transforms_are_named(model, ids):
    for name, said in [
        ("vmap", "torch.func"),
        ("autocast", "autocast"),
        ("checkpoint", "checkpoint"),
    ]:
        with pytest.raises(RecordingError, match=said), model.trace(ids):
            UNSEEN[name](model.transformer.h[1].output)


def test_torch_compile_says_so_too(model, ids):
    """Its compiler wraps every error in one of its own."""
    with pytest.raises(Exception, match=r"torch\.compile cannot be recorded"), model.trace(ids):
        torch.compile(torch.sin, backend="eager")(model.transformer.h[1].output)


def test_recurrent_layers_are_refused_with_the_way_out(model, ids):
    layer = torch.nn.GRU(32, 8, batch_first=True)
    with pytest.raises(UnsupportedOperationError, match="cells"), model.trace(ids):
        layer(model.transformer.h[1].output)


def test_the_block_can_go_on_after_a_refusal_that_was_caught(model, ids, gpt2):
    with model.trace(ids):
        for name in ("data_ptr", "vmap", "autocast", "pickle"):
            with pytest.raises((RecordingError, TypeError)):
                UNSEEN[name](model.transformer.h[1].output)
        logits = model.lm_head.output.save()
    bitwise(logits, gpt2.baseline)


def test_deepcopy_is_a_recorded_clone(model, net, ids):
    key = "transformer.h.1.output"
    with model.trace(ids):
        h = model.transformer.h[1].output
        mine = copy.deepcopy(h)
        nested = copy.deepcopy({"a": [h]})
        mine.zero_()
        zero, kept, logits = mine.save(), nested["a"][0].save(), model.lm_head.output.save()
    seen = with_hooks(net, {key: None}, ids)
    assert not zero.any()
    bitwise([kept, logits], [seen[key], seen.result.logits])


def test_copy_is_another_handle_on_the_same_tensor(model, ids):
    with model.trace(ids):
        h = model.transformer.h[1].output
        same = copy.copy(h)
        same[:] = 3
        got = h.save()
    assert (got == 3).all()


# Devices are hints


def test_device_hints_do_not_reach_the_graph(model, net, ids, v):
    key = "transformer.h.1.output"
    with model.trace(ids) as tracer:
        h = model.transformer.h[1].output
        assert h.device == torch.device("cpu") and not h.is_meta and h.is_cpu
        got = (h.to(v.device).cpu() + v.to(h.device)).save()
        made = torch.zeros(h.shape, device=h.device).save()
    bitwise(got, with_hooks(net, {key: None}, ids)[key] + v)
    assert made.device.type == "cpu"
    assert "cpu" not in str(tracer.graph) and "meta" not in str(tracer.graph)


# Paths and options


def test_an_unknown_path_names_the_nearest(model, ids):
    with pytest.raises(UnknownPathError) as caught:
        model.transformer.h[0].atn
    assert "transformer.h.0.attn" in str(caught.value)
    with pytest.raises(AttributeError, match="transformer"):
        model.transfomer
    with pytest.raises(UnknownPathError), model.trace(ids):
        model.layers[0].output
    with pytest.raises(UnknownPathError, match=r"transformer\.h"):
        model.get("transformer.h.0.mpl")
    assert not hasattr(model, "nothing_of_this_name")


def test_an_index_beyond_the_layers_says_how_many_there_are(model):
    with pytest.raises(IndexError, match="3"):
        model.transformer.h[7]


def test_assigning_to_what_is_no_site_raises(model, ids):
    with pytest.raises(AttributeError, match="outputs"), model.trace(ids):
        model.transformer.h[0].outputs = 3
    with pytest.raises(AttributeError):
        model.transformer.h[0].mlp = 3


@pytest.mark.parametrize(
    "options",
    [
        {"sede": 1},
        {"max_new_tokens": 3},
        {"labels": 1},
        {"output_hidden_state": True},
        {"seed": -1},
        {"seed": "one"},
        {"remote": "nowhere"},
        {"remote": 3},
        {"blocking": False, "remote": False},
        {"blocking": "yes"},
        {"past_key_values": None},
        {"use_cache": 3},
    ],
    ids=str,
)
def test_an_unknown_option_raises(model, ids, options):
    with pytest.raises(UnknownOptionError) as caught:
        model.trace(ids, **options)
    assert next(iter(options)).partition("_")[0] in str(caught.value)


def test_an_unknown_loading_option_raises():
    with pytest.raises(UnknownOptionError):
        weft.LanguageModel(zoo.build("gpt2"), torch_dytpe=torch.float16)


def test_inputs_that_are_none_raise(model):
    for inputs in (([],), ("text without a tokenizer",), (3.5,), (object(),)):
        with pytest.raises(InputError):
            model.trace(*inputs)
    with pytest.raises(InputError, match="one"):
        model.trace([1, 2], [3, 4])


# Where a block may be used


def test_a_site_outside_a_block_raises(model, v):
    for use in (
        lambda: model.transformer.h[0].output,
        lambda: model.transformer.h[0].inputs,
        lambda: setattr(model.transformer.h[0], "input", v),
        lambda: model.transformer.h[0].calls[0],
    ):
        with pytest.raises(OutsideTraceError) as caught:
            use()
        assert __file__ in str(caught.value.line)


def test_a_site_of_another_model_raises(model, ids, llama):
    with pytest.raises(OutsideTraceError, match="another model"), model.trace(ids):
        llama.model.model.layers[0].output


def test_a_block_inside_a_block_raises_and_the_outer_goes_on(model, ids, gpt2):
    with model.trace(ids):
        with pytest.raises(RecordingError, match="inside another"), model.trace(ids):
            pass
        logits = model.lm_head.output.save()
    bitwise(logits, gpt2.baseline)


def test_a_value_of_an_earlier_block_that_was_not_saved_raises(model, ids):
    with model.trace(ids):
        old = model.transformer.h[0].output
        model.lm_head.output.save()
    for use in (
        lambda: old + 1,
        lambda: model.transformer.h[1].output + old,
        lambda: setattr(model.transformer.h[1], "output", old),
        lambda: model.transformer.h[1].output.copy_(old),
        lambda: model.lm_head(old),
        lambda: old.sum().item(),
        lambda: float(old[0, 0, 0]),
        lambda: old.tolist(),
        lambda: bool(old.sum() > 0),
        lambda: torch.zeros(3)[old],
        lambda: weft.save([old]),
        lambda: weft.save([]).append(old),
        lambda: tracer.log(old),
        lambda: model.transformer.h[1].attn.output.__setitem__(0, old),
    ):
        with pytest.raises(NotSavedError), model.trace(ids) as tracer:
            use()
            model.lm_head.output.save()


def test_a_value_on_another_thread_raises(model, ids, gpt2):
    caught = []

    def work(h):
        try:
            h + 1
        except OutsideTraceError as error:
            caught.append(error)

    with model.trace(ids):
        thread = threading.Thread(target=work, args=(model.transformer.h[0].output,))
        thread.start()
        thread.join()
        logits = model.lm_head.output.save()
    assert "thread" in caught[0].message
    bitwise(logits, gpt2.baseline)


def test_another_thread_does_not_see_the_block(model, ids):
    seen = []

    def work():
        seen.append(type(torch.zeros(3)))
        try:
            model.transformer.h[0].output
        except OutsideTraceError as error:
            seen.append(error)

    with model.trace(ids):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        model.lm_head.output.save()
    assert seen[0] is torch.Tensor and isinstance(seen[1], OutsideTraceError)


def test_the_users_own_error_is_the_users_own(model, ids):
    with pytest.raises(KeyError, match="mine"), model.trace(ids):
        model.transformer.h[0].output.save()
        {}["mine"]


def test_a_module_that_never_runs_raises(subjects):
    class Idle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = weft.Model(Idle())
    with pytest.raises(NotReachedError, match="never called"), model.trace(torch.ones(2, 4)):
        model.idle.output


def test_the_zeroth_row_of_a_former_tuple_warns_with_both_spellings(model, ids):
    with pytest.warns(FutureWarning, match=r"\.output\[:1\]") as caught, model.trace(ids):
        row = model.transformer.h[0].output[0].save()
    assert row.shape == (9, 32)
    assert caught[0].filename == __file__


def test_models_of_tests_are_made_in_one_place(place):
    assert place.language(zoo.build("gpt2")).transformer.h
