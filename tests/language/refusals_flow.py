"""Refusals of what steers a block, as `refusals`: looks, skips, gradients, invokes, options."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from tests.language.refusals import A, B, refused
from weft import errors as e
from weft.handles.language import LanguageModel

# -- looks -----------------------------------------------------------------------------------------


@refused(e.LookError, "a number is needed here", "does not run", fix="torch.where")
def look_in_a_scan(on):
    with on.model.scan(on.ids):
        float(on.h[0].output.sum())  # here


# -- skips and stops -------------------------------------------------------------------------------


@refused(e.NotReachedError, "transformer.h.1.mlp.output does not fire", "transformer.h.1 is skip",
         "on.h[1].skip(on.h[0].output)", fix="skip only the modules inside")  # fmt: skip
def site_inside_a_skip(on):
    with on.trace():
        on.h[1].skip(on.h[0].output)
        on.h[1].mlp.output  # here


@refused(e.RecordingError, "transformer.h.1 is skipped twice", "on.h[1].skip(on.h[0].output)",
         fix="skip it once")  # fmt: skip
def skipped_twice(on):
    with on.trace():
        on.h[1].skip(on.h[0].output)
        on.h[1].skip(on.h[0].output * 2)  # here


@refused(e.RecordingError, "transformer.h.1 is skipped, and with it transformer.h.1.mlp",
         fix="leave the inner skip out")  # fmt: skip
def skip_around_a_skip(on):
    with on.trace():
        on.h[1].mlp.skip(on.h[0].output)
        on.h[1].skip(on.h[0].output)  # here


@refused(e.RecordingError, "transformer.h.1 is skipped after transformer.h.1.mlp.output was used",
         "on.h[1].mlp.output.save()", fix="below the skip")  # fmt: skip
def skip_of_what_was_used(on):
    with on.trace():
        on.h[1].mlp.output.save()
        on.h[1].skip(on.h[0].output)  # here


@refused(e.LateEditError, "transformer.h.1 is skipped with a value that exists only after",
         fix="from its .input or from an earlier site")  # fmt: skip
def late_skip(on):
    with on.trace():
        on.h[1].skip(on.h[2].output)  # here


@refused(e.LateEditError, "transformer.h.0 is skipped after a number was looked at",
         "if on.h[1].output.sum()", fix="above the look")  # fmt: skip
def skip_after_a_look(on):
    with on.trace():
        if on.h[1].output.sum() < 1e9:
            on.h[0].skip(on.h[0].input)  # here


@refused(e.WriteMismatchError, "transformer.h.1.output holds float32[1, 9, 32]", "float32[3]",
         fix="[1, 9, 32]")  # fmt: skip
def skip_with_another_shape(on):
    with on.trace():
        on.h[1].skip(torch.ones(3))  # here


@refused(e.RecordingError, "tracer.stop_if was given float32[1, 9, 32]", "not one number",
         fix=".any() or .all()")  # fmt: skip
def stop_on_many_numbers(on):
    with on.trace() as tracer:
        tracer.stop_if(on.h[0].output)  # here


# -- gradients -------------------------------------------------------------------------------------


@refused(e.GradientError, "no backward in this block", fix="call loss.backward()")
def gradient_without_backward(on):
    with on.trace():
        on.h[0].output.grad.save()  # here


@refused(e.GradientError, "does not depend on this value", "float32[1, 9, 32]",
         "loss.backward()", fix="what the loss is made of")  # fmt: skip
def gradient_of_what_the_loss_ignores(on):
    with on.trace():
        other = on.h[2].output * 2
        loss = on.h[1].output.sum()
        loss.backward()
        other.grad.save()  # here


@refused(e.GradientError, "depends on its own gradient", fix="after loss.backward()")
def loss_of_its_own_gradient(on):
    with on.trace():
        h = on.h[1].output
        (h.sum() * h.grad.sum()).backward()  # here
        h.grad.save()


@refused(e.RecordingError, "a loss of shape [1, 9, 32] is not one number",
         fix="loss.backward(gradient)")  # fmt: skip
def loss_of_many_numbers(on):
    with on.trace():
        on.h[1].output.backward()  # here


@refused(e.RecordingError, "the loss is float32[1, 9, 32], but its gradient float32[3]",
         fix="of the loss's own shape")  # fmt: skip
def seed_of_another_shape(on):
    with on.trace():
        on.h[1].output.backward(torch.ones(3))  # here


@refused(e.RecordingError, "more or fewer gradients than losses", fix="give each one")
def seeds_without_losses(on):
    with on.trace():
        h = on.h[1].output
        torch.autograd.grad([h.sum()], [h], [torch.ones(()), torch.ones(())])  # here


@refused(e.RecordingError, "is_grads_batched=True", fix="once for each of the gradients")
def batched_gradients(on):
    with on.trace():
        h = on.h[1].output
        torch.autograd.grad(h.sum(), h, is_grads_batched=True)  # here


@refused(
    e.GradientError,
    "int64[1, 9, 32] has no gradient",
    "only floating",
    fix="before it became whole numbers",
)
def gradient_of_whole_numbers(on):
    with on.trace():
        on.h[1].output.long().grad  # here


@refused(e.RecordingError, "a str has no gradient", fix="give a tensor")
def gradient_of_text(on):
    with on.trace():
        torch.autograd.grad(on.h[1].output.sum(), ["text"])  # type: ignore[list-item]  # here


@refused(e.RecordingError, "a str cannot be a gradient", fix="a tensor of its shape")
def text_as_a_gradient(on):
    with on.trace():
        on.h[0].output.grad = "text"  # here


@refused(e.WriteMismatchError, "the gradient is float32[1, 9, 32], but float32[3]",
         fix="[1, 9, 32]")  # fmt: skip
def gradient_of_another_shape(on):
    with on.trace():
        on.h[0].output.grad = torch.ones(3)  # here


@refused(e.StaleHandleError, "this gradient was read before", "h.grad = torch.ones(1, 9, 32)",
         fix="read .grad again")  # fmt: skip
def stale_gradient(on):
    with on.trace():
        h = on.h[0].output
        old = h.grad
        h.grad = torch.ones(1, 9, 32)
        old[:] = 0  # here
        on.h[1].output.sum().backward()


@refused(e.RecordingError, "assigned after its backward", fix="with loss.backward():")
def gradient_assigned_too_late(on):
    with on.trace():
        h = on.h[0].output
        on.h[1].output.sum().backward()
        h.grad = torch.ones(1, 9, 32)  # here


@refused(e.GradientError, "computed under torch.no_grad()", fix="")
def gradient_through_no_grad(on):
    with on.trace():
        h = on.h[0].output
        with torch.no_grad():
            twice = h * 2  # here
        twice.sum().backward()
        h.grad.save()


# -- invokes and blocks ----------------------------------------------------------------------------


@refused(e.OutsideTraceError, "transformer.h.0.output was used outside of an invoke",
         fix="with tracer.invoke(prompt):")  # fmt: skip
def site_outside_of_an_invoke(on):
    with on.model.trace() as tracer:
        with tracer.invoke(A):
            on.h[0].output.save()
        on.h[0].output  # here


@refused(e.RecordingError, "inside another one", fix="close the outer one first")
def invoke_in_an_invoke(on):
    with on.model.trace() as tracer, tracer.invoke(A), tracer.invoke(B):  # here
        pass


@refused(e.RecordingError, "after an empty one", fix="open the empty one last")
def invoke_after_an_empty_one(on):
    with on.model.trace() as tracer:
        with tracer.invoke(A):
            pass
        with tracer.invoke():
            on.model.lm_head.output.save()
        tracer.invoke(B)  # here


@refused(e.RecordingError, "there is none yet", fix="")
def empty_invoke_alone(on):
    with on.model.trace() as tracer, tracer.invoke():  # here
        pass


@refused(e.RecordingError, "a block that has an input already", fix="with model.trace() as tracer:")
def invoke_in_a_block_with_an_input(on):
    with on.trace() as tracer:
        tracer.invoke(A)  # here


@refused(e.UnknownOptionError, "seed is an option of the whole block", fix="model.trace(seed=...)")
def option_of_the_block_in_an_invoke(on):
    with on.model.trace() as tracer:
        tracer.invoke(A, seed=1)  # here


@refused(e.RecordingError, "an invoke was opened a second time", fix="tracer.invoke")
def invoke_twice(on):
    with on.model.trace() as tracer:
        with tracer.invoke(A) as one:
            pass
        with one:  # here
            pass


@refused(e.RecordingError, "several inputs", "which is meant", fix="ask inside an invoke")
def lengths_of_which(on):
    with on.model.trace() as tracer:
        with tracer.invoke(A):
            pass
        tracer.lengths  # here


@refused(e.RecordingError, "lm_head was applied before the block's first invoke",
         fix="with tracer.invoke(prompt):")  # fmt: skip
def module_applied_before_invokes(on):
    with on.model.trace() as tracer:
        on.model.lm_head(torch.ones(1, 2, 32) + torch.zeros(1))  # here
        with tracer.invoke(A):
            pass


@refused(e.RecordingError, "is edited after an empty invoke has shown",
         "transformer.h.0.output", fix="above the empty invoke")  # fmt: skip
def edit_after_the_whole_was_shown(on):
    with on.model.trace() as tracer:
        with tracer.invoke(A):
            h = on.h[0].output
        with tracer.invoke():
            on.model.lm_head.output.save()
        h[:] = 0  # here


@refused(e.RecordingError, "more than 512 invokes", fix="several blocks")
def too_many_invokes(on):
    with on.model.trace() as tracer:
        for _ in range(513):
            with tracer.invoke(A):  # here
                pass


@refused(e.OutsideTraceError, "used on another thread", fix="a block of its own on each thread")
def value_on_another_thread(on):
    with on.trace(), ThreadPoolExecutor(1) as pool:
        h = on.h[0].output
        pool.submit(lambda: h + 1).result()  # here


@refused(e.RecordingError, "inside another block", fix="close the outer block first")
def block_in_a_block(on):
    with on.trace(), on.trace():  # here
        pass


@refused(e.RecordingError, "a block was opened a second time", fix="model.trace(...) again")
def block_twice(on):
    tracer = on.trace()
    with tracer:
        pass
    with tracer:  # here
        pass


@refused(e.UnknownPathError, "rename: the model has no module 'nothing'", fix="")
def rename_of_nothing(on):
    LanguageModel(on.net, rename={"nothing": "x"})  # here


@refused(e.UnknownOptionError, "rename takes a dict, not a list", fix="{'h': 'layers'}")
def rename_by_a_list(on):
    LanguageModel(on.net, rename=[1])  # type: ignore[arg-type]  # here


@refused(e.UnknownOptionError, "dtype is a floating dtype", "not 3", fix="torch.float16")
def cache_of_no_dtype(on):
    with on.trace() as tracer:
        tracer.cache(dtype=3)  # here


# -- inputs and options ----------------------------------------------------------------------------


@refused(e.UnknownOptionError, "unknown option 'sede'", fix="")
def unknown_option(on):
    on.model.trace(on.ids, sede=1)  # here


@refused(e.UnknownOptionError, "seed is a whole number from 0, not -1", fix="seed=0")
def seed_below_zero(on):
    on.model.trace(on.ids, seed=-1)  # here


@refused(e.UnknownOptionError, "alone is True or False, not 3", fix="alone=True")
def option_that_is_no_truth(on):
    on.model.trace(on.ids, alone=3)  # here


@refused(e.UnknownOptionError, "remote='nowhere' means no place", fix="'local'")
def no_place(on):
    on.model.trace(on.ids, remote="nowhere")  # here


@refused(e.InputError, "a text was given", "no tokenizer", fix="token ids")
def text_without_a_tokenizer(on):
    on.model.trace("text")  # here


@refused(e.InputError, "token id 999 at row 0, position 1", "vocabulary of 128", fix="")
def token_outside_the_vocabulary(on):
    on.model.trace([3, 999])  # here


@refused(e.InputError, "trace takes one input, not 2", fix="trace([a, b])")
def two_inputs(on):
    on.model.trace([3], [4])  # here


@refused(e.InputError, "the prompt has 99 positions, this model has 64", fix="")
def prompt_that_is_too_long(on):
    on.model.trace([3] * 99)  # here


@refused(e.InputError, "the prompt is empty", fix="")
def empty_prompt(on):
    with on.model.trace() as tracer:
        tracer.invoke([])  # here


# -- sessions --------------------------------------------------------------------------------------


@refused(e.GradientError, "the loss depends on a value of an earlier block of the session",
         "h = model.transformer.h[1].output * v", fix="trace(..., grad=True)")  # fmt: skip
def gradient_into_an_earlier_block(on):
    v = torch.ones(32, requires_grad=True)
    model = LanguageModel(on.net)  # sessions are of this process
    with model.session():
        with model.trace(on.ids):
            h = model.transformer.h[1].output * v
        with model.trace(on.ids):
            model.transformer.h[1].output = h + v  # here
            model.lm_head.output.sum().backward()
