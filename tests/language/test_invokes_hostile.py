"""Invokes that share a forward: one pass, and no neighbour can be felt, however hostile.

The oracle is the prompt alone. Half precision is held against the same weights in float32.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import weft
from tests.families import zoo
from tests.language.hooks import hook_count, with_hooks
from weft.testing.same import bitwise, bounded, greedy, moves

A, B, C = [torch.tensor([row]) for row in zoo.tokens(9, 4, 6, seed=1)]
LONG = torch.tensor(zoo.tokens(40, seed=4))
EIGHT = [torch.tensor([row]) for row in zoo.tokens(3, 9, 5, 14, 2, 7, 11, 6, seed=5)]
HOSTILE = {"nan": float("nan"), "inf": float("inf"), "minus inf": float("-inf"), "1e30": 1e30}


def hidden(value):
    return value[0] if isinstance(value, tuple) else value


def layer(subject, number):
    return subject.model.get(subject.paths.layer(number))


class Forwards:
    """Counts the rows and forwards that a module sees."""

    def __init__(self, net, path):
        self.rows = []
        self._handle = net.get_submodule(path).register_forward_hook(self._see)

    def _see(self, module, args, output):
        if not hidden(output).is_meta and type(hidden(output)) is torch.Tensor:
            self.rows.append(hidden(output).shape[0])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._handle.remove()


def warmed(subject):
    """After the model's trial, and the passes without weights for these lengths."""
    for _ in range(2):
        with subject.model.trace() as tracer:
            for ids in (*EIGHT, LONG, A, B, C):
                with tracer.invoke(ids):
                    tracer.result.logits.save()
    return subject


# -- one forward ---------------------------------------------------------------------------------


def test_eight_prompts_share_one_forward(gpt2):
    warmed(gpt2)
    with Forwards(gpt2.net, gpt2.paths.layer(0)) as forwards, gpt2.model.trace() as tracer:
        got = []
        for ids in EIGHT:
            with tracer.invoke(ids):
                got.append(tracer.result.logits.save())
    assert forwards.rows == [8]
    with torch.no_grad():
        for ids, logits in zip(EIGHT, got, strict=True):
            expected = gpt2.net(ids).logits
            bounded(logits, expected)
            greedy(logits, expected)


def test_alone_gives_each_a_forward(gpt2):
    warmed(gpt2)
    with Forwards(gpt2.net, gpt2.paths.layer(0)) as forwards, gpt2.model.trace(alone=True) as t:
        got = []
        for ids in (A, B):
            with t.invoke(ids):
                got.append(t.result.logits.save())
    assert forwards.rows == [1, 1]
    with torch.no_grad():
        bitwise(got, [gpt2.net(ids).logits for ids in (A, B)])


def test_a_shared_forward_ends_where_nobody_needs_more(gpt2):
    warmed(gpt2)
    with Forwards(gpt2.net, gpt2.paths.layer(2)) as forwards, gpt2.model.trace() as tracer:
        with tracer.invoke(A):
            gpt2.layer_list[0].output.save()
        with tracer.invoke(B):
            gpt2.layer_list[1].output.save()
    assert forwards.rows == []


def test_values_in_step_need_one_forward_and_patchscopes_two(gpt2):
    warmed(gpt2)
    layers = gpt2.layer_list
    for come, go, expected in ((1, 1, [2]), (0, 2, [2]), (2, 0, [1, 1])):
        with Forwards(gpt2.net, gpt2.paths.layer(0)) as forwards, gpt2.model.trace() as tracer:
            with tracer.invoke(A):
                taken = layers[come].output[:, -1]
            with tracer.invoke(B):
                layers[go].output[:, -1] = taken
                tracer.result.logits.save()
        assert forwards.rows == expected


def test_invokes_that_need_each_other_in_step_share_one(gpt2):
    warmed(gpt2)
    layers = gpt2.layer_list
    with Forwards(gpt2.net, gpt2.paths.layer(0)) as forwards, gpt2.model.trace() as tracer:
        with tracer.invoke(A):
            a = layers[0].output[:, -1]
            of_a = layers[1].output
            tracer.result.logits.save()
        with tracer.invoke(B):
            layers[1].output[:, -1] = a
            of_a[:, -1] = layers[0].output[:, -1]
            tracer.result.logits.save()
    assert forwards.rows == [2]


def test_a_site_without_rows_lets_its_invoke_run_alone(llama):
    """Rotary embeddings have no batch: whose they are, nobody can say."""
    warmed(llama)
    rotary = llama.model.get("model.rotary_emb")
    with Forwards(llama.net, llama.paths.layer(0)) as forwards, llama.model.trace() as tracer:
        with tracer.invoke(A):
            tracer.result.logits.save()
        with tracer.invoke(B):
            cos = rotary.output[0].save()
            tracer.result.logits.save()
        with tracer.invoke(C):
            tracer.result.logits.save()
    assert sorted(forwards.rows) == [1, 2]
    bitwise(cos, with_hooks(llama.net, {"model.rotary_emb.output": None}, B)[
        "model.rotary_emb.output"][0])  # fmt: skip


def test_a_batch_that_is_padded_inside_runs_alone(llama):
    warmed(llama)
    rows = [A[0].tolist(), B[0].tolist()]
    with llama.model.trace(rows):
        expected = llama.layer_list[1].output.save()
    with llama.model.trace() as tracer:
        with tracer.invoke(rows):
            h = llama.layer_list[1].output.save()
        with tracer.invoke(C):
            tracer.result.logits.save()
    bitwise(h, expected)


def test_a_batch_of_equal_lengths_shares(llama):
    warmed(llama)
    ids = torch.cat([A, A.flip(1)])
    with Forwards(llama.net, llama.paths.layer(0)) as forwards, llama.model.trace() as tracer:
        with tracer.invoke(B):
            b = tracer.result.logits.save()
        with tracer.invoke(ids):
            both = tracer.result.logits.save()
    assert forwards.rows == [3]
    with torch.no_grad():
        bounded([b, both], [llama.net(B).logits, llama.net(ids).logits])


# -- every family, half precision too --------------------------------------------------------------


def test_each_family_beside_others(subject):
    reference = copy.deepcopy(subject.net).float()

    def by_hand(net, ids):
        def half(value):
            hidden(value)[:, -1] *= 0.5

        with torch.no_grad():
            return with_hooks(net, {f"{subject.paths.layer(1)}.output": half}, ids).result.logits

    with subject.model.trace() as tracer:
        got = []
        for ids in (A, LONG, B, C):
            with tracer.invoke(ids):
                hidden(layer(subject, 1).output)[:, -1] *= 0.5
                got.append(tracer.result.logits.save())
    for logits, ids in zip(got, (A, LONG, B, C), strict=True):
        bounded(logits, by_hand(subject.net, ids), by_hand(reference, ids))
        with torch.no_grad():
            moves(logits, subject.net(ids).logits)


# -- hostile neighbours --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mixtral", "gemma2"])
@pytest.mark.parametrize("poison", HOSTILE)
def test_no_neighbour_is_felt(subjects, name, poison):
    subject = subjects(name)
    net, model, paths = subject.net, subject.model, subject.paths
    expected = {}
    for ids in (A, B):
        sites = [f"{paths.layer(n)}.output" for n in range(zoo.LAYERS)]
        seen = with_hooks(net, dict.fromkeys(sites), ids)
        expected[ids.shape[1]] = [hidden(seen[site]) for site in sites] + [seen.result.logits]
    got = {}
    with model.trace() as tracer:
        for ids in (A, LONG, C, B):
            with tracer.invoke(ids):
                layers = [model.get(paths.layer(n)) for n in range(zoo.LAYERS)]
                if ids is C:
                    for one in layers:
                        hidden(one.output)[:] = HOSTILE[poison]
                    tracer.result.logits.save()
                elif ids is LONG:
                    hidden(layers[0].output)[:] *= HOSTILE[poison]
                    tracer.result.logits.save()
                else:
                    got[ids.shape[1]] = weft.save(
                        [hidden(one.output) for one in layers] + [tracer.result.logits]
                    )
    for length, values in expected.items():
        bounded(got[length], values)


def test_an_index_error_names_its_line_and_leaves_the_model(gpt2):
    warmed(gpt2)
    with pytest.raises(Exception, match=r"out of (range|bounds)") as caught:  # noqa: SIM117
        with gpt2.model.trace() as tracer:
            with tracer.invoke(A):
                tracer.result.logits.save()
            with tracer.invoke(B):
                h = gpt2.layer_list[1].output
                where = h[0, 0, :1].abs().long() + 100
                h[:, :1] += h[:, where]  # the line
                tracer.result.logits.save()
    told = str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
    assert "test_invokes_hostile" in told
    assert hook_count(gpt2.net) == 0
    with gpt2.model.trace(A) as tracer:
        logits = tracer.result.logits.save()
    with torch.no_grad():
        bitwise(logits, gpt2.net(A).logits)


def test_a_slice_holds_nobody_elses_memory(gpt2):
    warmed(gpt2)
    with gpt2.model.trace() as tracer:
        for ids in (LONG, B):
            with tracer.invoke(ids):
                h = gpt2.layer_list[1].output.save()
    assert h.shape == (1, 4, 32)
    assert h.untyped_storage().nbytes() == h.nbytes


# -- models that mix their rows --------------------------------------------------------------------


class Mixing(torch.nn.Module):
    """An MLP that adds the mean of the batch: alone it is another function than in company."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + x.mean(0, keepdim=True)


def test_a_model_that_mixes_rows_runs_one_by_one():
    net = zoo.build("llama")
    net.model.layers[1].mlp = Mixing(net.model.layers[1].mlp)
    model = weft.LanguageModel(net)
    with model.trace() as tracer:
        got = []
        for ids in (A, B):
            with tracer.invoke(ids):
                got.append(tracer.result.logits.save())
    with torch.no_grad():
        bitwise(got, [net(ids).logits for ids in (A, B)])


def test_a_model_that_is_not_known_to_be_safe_runs_one_by_one():
    net = zoo.build("llama")
    net.config.rope_parameters = {**net.config.rope_parameters, "rope_type": "dynamic"}
    model = weft.LanguageModel(net)
    with Forwards(net, "model.layers.0") as forwards, model.trace() as tracer:
        for ids in (A, B):
            with tracer.invoke(ids):
                tracer.result.logits.save()
    assert forwards.rows == [1, 1]


# -- anything ------------------------------------------------------------------------------------

EDITS = st.sampled_from(["none", "read", "scale", "zero", "nan", "replace", "take"])
ONE = st.tuples(st.integers(1, 12), EDITS, st.integers(0, zoo.LAYERS - 1))


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(ONE, min_size=2, max_size=6), st.integers(0, 2**16))
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_random_mixtures_equal_each_alone(subjects, name, plan, seed):
    subject = subjects(name)
    draw = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, zoo.VOCAB, (1, n), generator=draw) for n, _, _ in plan]

    def block(tracer, what, number, given):
        layers = subject.layer_list
        h = layers[number].output
        if what == "scale":
            h[:, -1] *= -2
        elif what == "zero":
            h[..., ::2] = 0
        elif what == "nan":
            h[:, 0] = float("nan")
        elif what == "replace":
            layers[number].output = h.flip(-1) + 1
        elif what == "take":
            h[:, -1] = given
        kept = [layers[n].output for n in range(zoo.LAYERS)] if what == "read" else []
        return weft.save([*kept, tracer.result.logits])

    given_row = torch.linspace(-1, 1, 32)
    with subject.model.trace() as tracer:
        got = []
        for ids, (_, what, number) in zip(prompts, plan, strict=True):
            with tracer.invoke(ids):
                got.append(block(tracer, what, number, given_row))
    for ids, values, (_, what, number) in zip(prompts, got, plan, strict=True):
        with subject.model.trace(ids) as tracer:
            expected = block(tracer, what, number, given_row)
        bounded(values, expected)
