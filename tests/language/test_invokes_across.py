"""Values between invokes: in any direction, in any order of the lines, and never in a circle.

The oracle is plain hooks: the source is run first by hand, its value is patched into the other.
"""

from __future__ import annotations

import pytest
import torch

import weft
from tests.families import zoo
from tests.language.hooks import hook_count, with_hooks
from tests.leftovers import running, threads_started
from weft.errors import LateEditError
from weft.testing.same import bitwise, bounded, moves

A, B, C = [torch.tensor([row]) for row in zoo.tokens(9, 4, 6, seed=1)]
LAYERS = range(zoo.LAYERS)


def hidden(value):
    return value[0] if isinstance(value, tuple) else value


def at(subject, number):
    return f"{subject.paths.layer(number)}.output"


def by_hand(subject, source, source_layer, target, target_layer):
    """The target's logits with the source's last hidden state patched in, by hooks."""
    seen = with_hooks(subject.net, {at(subject, source_layer): None}, source)
    taken = hidden(seen[at(subject, source_layer)])[:, -1].clone()

    def patch(value):
        hidden(value)[:, -1] = taken

    return with_hooks(subject.net, {at(subject, target_layer): patch}, target).result.logits


def out(subject, number):
    return hidden(subject.model.get(subject.paths.layer(number)).output)


# -- both directions, both orders ------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(1, 1), (0, 2), (2, 0)], ids=str)
def test_the_source_stands_first(subject, layers):
    come, go = layers
    expected = by_hand(subject, A, come, B, go)
    with subject.model.trace(alone=True) as tracer:
        with tracer.invoke(A):
            taken = out(subject, come)[:, -1]
        with tracer.invoke(B):
            out(subject, go)[:, -1] = taken
            logits = tracer.result.logits.save()
    bitwise(logits, expected)
    with torch.no_grad():
        moves(logits, subject.net(B).logits)


@pytest.mark.parametrize("layers", [(1, 1), (0, 2), (2, 0)], ids=str)
def test_the_target_stands_first(llama, layers):
    """The lines may stand in any order: an edit of an earlier invoke's handle."""
    come, go = layers
    expected = by_hand(llama, A, come, B, go)
    with llama.model.trace(alone=True) as tracer:
        with tracer.invoke(B):
            target = llama.layer_list[go].output
            logits = tracer.result.logits.save()
        with tracer.invoke(A):
            target[:, -1] = llama.layer_list[come].output[:, -1]
    bitwise(logits, expected)


@pytest.mark.parametrize("layers", [(1, 1), (0, 2), (2, 0)], ids=str)
def test_patches_where_invokes_may_share_a_forward(llama, layers):
    come, go = layers
    expected = by_hand(llama, A, come, B, go)
    with llama.model.trace() as tracer:
        with tracer.invoke(A):
            taken = llama.layer_list[come].output[:, -1]
        with tracer.invoke(B):
            llama.layer_list[go].output[:, -1] = taken
            logits = tracer.result.logits.save()
    bounded(logits, expected)


def test_a_whole_site_is_replaced(llama):
    seen = with_hooks(llama.net, {at(llama, 2): None}, A)
    expected = with_hooks(llama.net, {at(llama, 0): lambda _: seen[at(llama, 2)]}, A)
    with llama.model.trace() as tracer:
        with tracer.invoke(A):
            late = llama.layer_list[2].output
        with tracer.invoke(A):
            llama.layer_list[0].output = late
            logits = tracer.result.logits.save()
    bounded(logits, expected.result.logits)


def test_one_source_for_many(llama):
    expected = [by_hand(llama, A, 1, B, number) for number in LAYERS]
    with llama.model.trace() as tracer:
        with tracer.invoke(A):
            taken = llama.layer_list[1].output[:, -1]
        found = []
        for number in LAYERS:
            with tracer.invoke(B):
                llama.layer_list[number].output[:, -1] = taken
                found.append(tracer.result.logits.save())
    bounded(found, expected)


def test_a_chain_of_patchscopes(llama):
    """Each invoke takes a late value of the one before: as many forwards as invokes."""
    first = with_hooks(llama.net, {at(llama, 2): None}, A)
    taken = first[at(llama, 2)][:, -1].clone()

    def patch(value):
        value[:, -1] = taken

    second = with_hooks(llama.net, {at(llama, 0): patch, at(llama, 2): None}, B)
    taken = second[at(llama, 2)][:, -1].clone()
    expected = with_hooks(llama.net, {at(llama, 0): patch}, C).result.logits
    layers = llama.layer_list
    with llama.model.trace() as tracer:
        with tracer.invoke(A):
            one = layers[2].output[:, -1]
        with tracer.invoke(B):
            layers[0].output[:, -1] = one
            two = layers[2].output[:, -1]
        with tracer.invoke(C):
            layers[0].output[:, -1] = two
            logits = tracer.result.logits.save()
    bounded(logits, expected)


# -- forwards that need each other -----------------------------------------------------------------


@pytest.mark.parametrize("alone", [True, False])
def test_two_invokes_give_each_other_early_values(llama, alone):
    """Neither forward can be first: they take turns."""
    layers = llama.layer_list
    expected = by_hand(llama, A, 0, B, 1), by_hand(llama, B, 0, A, 1)
    with llama.model.trace(alone=alone) as tracer:
        with tracer.invoke(A):
            a = layers[0].output[:, -1]
            of_a = layers[1].output
            logits_a = tracer.result.logits.save()
        with tracer.invoke(B):
            layers[1].output[:, -1] = a
            of_a[:, -1] = layers[0].output[:, -1]
            logits_b = tracer.result.logits.save()
    same = bitwise if alone else bounded
    same(logits_b, expected[0])
    same(logits_a, expected[1])


def test_values_go_back_and_forth(llama):
    """A's layer 2 goes into B's layer 0; B has nothing that A needs before: then A's norm."""
    layers, norm = llama.layer_list, llama.model.get(llama.paths.norm)
    a2 = with_hooks(llama.net, {at(llama, 2): None}, A)[at(llama, 2)][:, -1].clone()

    def to_b(value):
        value[:, -1] = a2

    b = with_hooks(llama.net, {at(llama, 0): to_b, at(llama, 2): None}, B)
    b2 = b[at(llama, 2)][:, -1].clone()

    def to_a(value):
        value[:, -1] = b2

    expected = with_hooks(llama.net, {f"{llama.paths.norm}.output": to_a}, A).result.logits
    with threads_started() as threads, llama.model.trace() as tracer:
        with tracer.invoke(A):
            from_a = layers[2].output[:, -1]
            of_a = norm.output
            logits = tracer.result.logits.save()
        with tracer.invoke(B):
            layers[0].output[:, -1] = from_a
            of_a[:, -1] = layers[2].output[:, -1]
    bounded(logits, expected)
    assert not running(threads, "weft forward")


def test_an_error_in_forwards_that_take_turns_leaves_nothing(llama):
    layers = llama.layer_list
    match = r"out of (range|bounds)"
    with (
        threads_started() as threads,
        pytest.raises(Exception, match=match) as caught,
        llama.model.trace(alone=True) as tracer,
    ):
        with tracer.invoke(A):
            a = layers[0].output[:, -1]
            of_a = layers[1].output
            tracer.result.logits.save()
        with tracer.invoke(B):
            where = layers[0].output[0, 0, :1].abs().long() + 100
            layers[1].output[:, -1] = a + layers[0].output[:, where].sum()
            of_a[:, -1] = layers[0].output[:, -1]
            tracer.result.logits.save()
    told = str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
    assert "test_invokes_across" in told
    assert hook_count(llama.net) == 0
    assert not running(threads, "weft forward")


def test_a_circle_is_refused_with_both_lines(llama):
    layers = llama.layer_list
    with pytest.raises(LateEditError) as caught, llama.model.trace() as tracer:
        with tracer.invoke(A):
            early = layers[0].output
            a = layers[2].output[:, -1]
        with tracer.invoke(B):
            layers[1].output[:, -1] = a  # one line
            b = layers[2].output[:, -1].save()
        early[:, -1] = b  # the other line
    told = str(caught.value)
    assert "early[:, -1] = b  # the other line" in told
    assert "layers[1].output[:, -1] = a  # one line" in told


def test_a_late_edit_inside_one_invoke_is_refused_at_its_line(llama):
    layers = llama.layer_list
    with pytest.raises(LateEditError, match="later"), llama.model.trace() as tracer:
        with tracer.invoke(A):
            pass
        with tracer.invoke(B):
            layers[0].output[:, -1] = layers[1].output[:, -1]


def test_a_late_edit_by_way_of_another_invoke(llama):
    layers = llama.layer_list
    with pytest.raises(LateEditError, match="the other line"), llama.model.trace() as tracer:
        with tracer.invoke(A):
            late = layers[2].output[:, -1]
            early = layers[0].output
        with tracer.invoke(B):
            mixed = late + layers[0].output[:, -1]
        early[:, -1] = mixed


def test_edits_that_only_feed_another_invoke_are_not_called_unused(llama, recwarn):
    layers = llama.layer_list
    with llama.model.trace() as tracer:
        with tracer.invoke(A):
            layers[0].output[:, -1] *= 2
            taken = layers[2].output[:, -1]
        with tracer.invoke(B):
            layers[0].output[:, -1] = taken
            tracer.result.logits.save()
    assert not [w for w in recwarn if "no effect" in str(w.message)]


def test_an_unused_edit_is_told(llama):
    layers = llama.layer_list
    with pytest.warns(UserWarning, match="no effect"), llama.model.trace() as tracer:
        with tracer.invoke(A):
            layers[2].output[:, -1] *= 2
            layers[0].output.save()
        with tracer.invoke(B):
            tracer.result.logits.save()


def test_a_saved_handle_of_one_is_used_in_another(llama):
    layers = llama.layer_list
    with llama.model.trace() as tracer:
        with tracer.invoke(A):
            h = layers[1].output.save()
            first = h.clone()
            h[:, -1] = 0
            first = weft.save([first])[0]
        with tracer.invoke(B):
            layers[1].output[:, -1] = h[:, -1]
            zero = layers[1].output[:, -1].save()
    assert not zero.any()
    bitwise(first, h)  # saved means frozen
