"""Refusals of inputs and options, before a block records anything, as `refusals`."""

from __future__ import annotations

import torch
from torch import nn

import weft
from tests.language.refusals import A, B, refused
from weft import errors as e
from weft.handles.anything import Model
from weft.handles.language import LanguageModel

# -- prompts ---------------------------------------------------------------------------------------


@refused(e.InputError, "trace takes one input, not 2", fix="trace([a, b])")
def two_prompts(on):
    on.model.trace(on.ids, on.ids)  # here


@refused(e.InputError, "cannot make a prompt of float 5.0", fix="ids")
def a_prompt_of_a_number(on):
    on.model.trace(5.0)  # here


@refused(e.InputError, "the prompt is empty: no row", fix="ids")
def no_prompt(on):
    on.model.trace([])  # here


@refused(e.InputError, "a list of rows holds str 'a' at index 1", fix="all of one kind")
def prompts_of_two_kinds(on):
    on.model.trace([[1, 2], "a"])  # here


@refused(e.InputError, "a row of token ids holds float 1.5", fix="one list of ints per prompt")
def a_token_that_is_no_number(on):
    on.model.trace([1, 1.5])  # here


@refused(e.InputError, "a row of a list is [pos], not [1, 2]", fix="one tensor [batch, pos]")
def a_row_of_rows(on):
    on.model.trace([torch.tensor([[1, 2]])])  # here


@refused(e.InputError, "whole numbers, not a tensor of torch.float32", fix="ids.long()")
def tokens_that_are_floats(on):
    on.model.trace(on.ids.float())  # here


@refused(e.InputError, "token ids are [pos] or [batch, pos], not [1, 1, 9]", fix="a batch of rows")
def tokens_of_three_dimensions(on):
    on.model.trace(on.ids[None])  # here


@refused(e.InputError, "message 0 of a chat is a dict without a text role", fix="'role': 'user'")
def a_message_without_content(on):
    on.model.trace([{"role": "user"}])  # here


@refused(e.InputError, "a chat is a list of messages", fix="[{'role'")
def a_chat_of_one_dict(on):
    on.model.trace({"role": "user", "content": "a"})  # here


# -- inputs by name --------------------------------------------------------------------------------


@refused(e.InputError, "input_ids given twice", fix="give it once")
def an_input_given_twice(on):
    on.model.trace(on.ids, input_ids=on.ids)  # here


@refused(e.InputError, "unknown input input_idz", fix="input_ids")
def an_unknown_input(on):
    on.model.trace({"input_idz": on.ids})  # here


@refused(e.InputError, "give the prompt once, as tokens or as inputs_embeds", fix="leave one of")
def tokens_and_embeddings(on):
    on.model.trace(on.ids, inputs_embeds=torch.ones(1, 9, 32))  # here


@refused(e.InputError, "inputs_embeds is a floating-point tensor", fix="[batch, pos, d_model]")
def embeddings_of_whole_numbers(on):
    on.model.trace(inputs_embeds=on.ids)  # here


@refused(e.InputError, "inputs_embeds is [batch, pos, d_model], not [1]", fix="one vector for each")
def embeddings_of_one_dimension(on):
    on.model.trace(inputs_embeds=torch.ones(1))  # here


@refused(e.InputError, "position_ids is [4], the tokens are [1, 9]", fix="[1, pos] or [batch, pos]")
def positions_of_another_length(on):
    on.model.trace(on.ids, position_ids=torch.arange(4))  # here


@refused(e.InputError, "position_ids holds whole numbers, not torch.float32", fix="give integers")
def positions_that_are_floats(on):
    on.model.trace(on.ids, position_ids=torch.ones(9))  # here


@refused(e.InputError, "position_ids holds negative numbers", fix="count from 0")
def negative_positions(on):
    on.model.trace(on.ids, position_ids=-torch.ones(9, dtype=torch.long))  # here


@refused(e.InputError, "position_ids is not a tensor", fix="a list of numbers")
def positions_that_are_text(on):
    on.model.trace(on.ids, position_ids="ab")  # here


# -- options ---------------------------------------------------------------------------------------


@refused(
    e.UnknownOptionError, "output_router_logits", "'gpt2' does not take it", fix="leave it out"
)
def an_option_of_other_models(on):
    on.model.trace(on.ids, output_router_logits=True)  # here


@refused(e.UnknownOptionError, "use_cache is True or False, not 1", fix="True or False")
def an_option_of_another_type(on):
    on.model.trace(on.ids, use_cache=1)  # here


@refused(e.UnknownOptionError, "seed is a whole number from 0, not -1", fix="seed=0")
def a_negative_seed(on):
    on.model.trace(on.ids, seed=-1)  # here


@refused(e.UnknownOptionError, "alone is True or False, not 'yes'", fix="alone=True")
def alone_that_is_text(on):
    on.model.trace(on.ids, alone="yes")  # here


@refused(e.UnknownOptionError, "eager=True: a scan has no numbers", fix="model.trace")
def an_eager_scan(on):
    on.model.scan(on.ids, eager=True)  # here


@refused(e.UnknownOptionError, "eager=True: this block runs", fix="remote=False")
def eager_elsewhere(on):
    on.model.trace(on.ids, eager=True, **({"remote": "local"} if on.is_here else {}))  # here


@refused(e.UnknownOptionError, "blocking=False: this block runs", "as a server would",
         fix="remote=True")  # fmt: skip
def sent_to_nobody(on):
    weft.Model(nn.Linear(2, 2)).trace(torch.ones(1, 2), remote="local", blocking=False)  # here


@refused(e.UnknownOptionError, "grad=True: this block runs", fix="loss.backward() inside")
def grad_elsewhere(on):
    weft.Model(nn.Linear(2, 2)).trace(torch.ones(1, 2), remote="local", grad=True)  # here


@refused(e.UnknownOptionError, "seed is an option of traces, not of an edit", fix="edited.trace")
def a_seed_of_an_edit(on):
    on.model.edit(seed=3)  # here


@refused(e.UnknownOptionError, "inplace is True or False, not 1", fix="inplace=True")
def inplace_that_is_a_number(on):
    on.model.edit(inplace=1)  # here


@refused(
    e.UnknownOptionError, "seed is an option of the whole block", fix="trace: model.trace(seed"
)
def a_seed_of_an_invoke(on):
    with on.model.trace() as tracer:
        tracer.invoke(A, seed=1)  # here


# -- generations -----------------------------------------------------------------------------------


@refused(
    e.UnknownOptionError, "grad=True: there are no gradients in a generation", fix="trace what"
)
def gradients_of_a_generation(on):
    on.model.generate(on.ids, grad=True)  # here


@refused(e.UnknownOptionError, "top_k='a': it is a whole number", fix="give one, or leave it out")
def top_k_that_is_text(on):
    on.model.generate(on.ids, top_k="a")  # here


@refused(e.UnknownOptionError, "unknown option 'temprature'", fix="did you mean temperature?")
def a_misspelt_option(on):
    on.model.generate(on.ids, temprature=2)  # here


@refused(e.UnknownOptionError, "num_beams=4", fix="")
def a_beam_search(on):
    on.model.generate(on.ids, num_beams=4)  # here


@refused(e.InputError, "row 0 of the prompt ends with padding", fix="pad on the left")
def a_prompt_that_ends_with_padding(on):
    mask = torch.tensor([[1] * 8 + [0]])
    with on.model.generate(on.ids, attention_mask=mask, max_new_tokens=2) as tracer:  # here
        tracer.result.save()


@refused(e.RecordingError, "a `with` block runs once, and these are 4 steps", fix="write a loop")
def with_all_steps(on):
    with on.model.generate(on.ids, max_new_tokens=4) as tracer, tracer.iter[:]:  # here
        pass


@refused(e.SamplingError, "the logits at step 0 are no distribution in row 0", fix="edits of this")
def logits_without_numbers(on):
    with on.model.generate(on.ids, max_new_tokens=2, do_sample=True) as tracer:  # here
        on.model.lm_head.output[:] = float("nan")
        tracer.result.save()


# -- sweeps ----------------------------------------------------------------------------------------


def _nothing(tracer, layer):
    return None


@refused(e.InputError, "the coordinate layer has 1 twice", fix="give it once")
def a_coordinate_twice(on):
    on.model.sweep(on.ids, _nothing, layer=[1, 1])  # here


@refused(e.InputError, "the coordinate layer has no values", fix="leave it out")
def a_coordinate_of_nothing(on):
    on.model.sweep(on.ids, _nothing, layer=[])  # here


@refused(e.InputError, "layer has 2 dimensions; a coordinate has one", fix="a row of values")
def a_coordinate_of_rows(on):
    on.model.sweep(on.ids, _nothing, layer=torch.ones(2, 2).numpy())  # here


@refused(e.InputError, "_nothing(tracer, layer) is called with (tracer, head)",
         fix="def f(tracer, head)")  # fmt: skip
def a_function_of_other_coordinates(on):
    on.model.sweep(on.ids, _nothing, head=[1])  # here


@refused(e.UnknownOptionError, "layer=3 is one value", fix="layer=[3]")
def a_coordinate_of_one_value(on):
    on.model.sweep(on.ids, _nothing, layer=3)  # here


@refused(e.UnknownOptionError, "batch is 'auto' or a number of points, not 0", fix="batch=8")
def batches_of_nothing(on):
    on.model.sweep(on.ids, _nothing, layer=[1], batch=0)  # here


@refused(e.UnknownOptionError, "eager=True: a sweep waits", fix="leave it out")
def an_eager_sweep(on):
    on.model.sweep(on.ids, _nothing, layer=[1], eager=True)  # here


# -- experiments -----------------------------------------------------------------------------------


@refused(e.InputError, "the experiment has 2 invokes, and 1 inputs were given", fix="one for each")
def an_experiment_with_too_few_inputs(on):
    with on.model.trace() as tracer:
        for prompt in (A, B):
            with tracer.invoke(prompt):
                on.model.lm_head.output.save()
    tracer.graph.run(on.model, A)  # here


@refused(e.UnknownOptionError, "blocking=False: Experiment.run waits", fix="leave it out")
def an_experiment_that_is_only_sent(on):
    with on.trace() as tracer:
        on.model.lm_head.output.save()
    tracer.graph.run(on.model, on.ids, blocking=False)  # here


@refused(e.GraphError, "recorded in a generation", fix="model.generate")
def an_experiment_of_an_unknown_generation(on):
    with on.model.generate(on.ids, max_new_tokens=2) as tracer:
        for _ in tracer.iter[1]:
            on.model.lm_head.output.save()
    kept = weft.Experiment(tracer.graph.graph, tracer.graph.constants)  # as an older file has it
    kept.run(on.model, on.ids)  # here


@refused(e.GraphError, "cannot be read", fix="Experiment.save wrote")
def an_experiment_that_is_not_there(on):
    weft.Experiment.load("no-such-file.weft")  # here


# -- other modules ---------------------------------------------------------------------------------


@refused(e.InputError, "Model takes a torch.nn.Module, not int", fix="LanguageModel")
def a_model_of_a_number(on):
    Model(5)  # type: ignore[arg-type]  # here


@refused(e.InputError, "a hub id, a folder or a torch.nn.Module, not int", fix="one of these")
def a_language_model_of_a_number(on):
    LanguageModel(5)  # here


@refused(e.UnknownOptionError, "batch_dim is the number of a dimension", "-1", fix="batch_dim=0")
def a_batch_counted_from_the_end(on):
    Model(nn.Linear(2, 2), batch_dim=-1)  # here


@refused(e.InputError, "an empty invoke shows", "not said in which dimension", fix="batch_dim=0")
def an_empty_invoke_without_a_batch(on):
    net = nn.Linear(2, 2)
    with weft.Model(net).trace() as tracer:
        with tracer.invoke(torch.ones(1, 2)):
            pass
        with tracer.invoke():  # here
            pass
