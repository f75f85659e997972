"""Which sites of shared steps are offered: formulas, and a trial of every one of them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.families import zoo
from tests.families.decoded import build
from weft.engine.stepping import Stepping, sharer
from weft.graph.site import Site


def _stepping(model: Any) -> Stepping:
    return sharer(model._signatures, model._facts)


def _shown(net: Any) -> Any:
    model = weft.LanguageModel(net)
    return _stepping(model)._shown(net)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mixtral", "bloom"])
def test_hidden_states_are_offered_and_what_is_as_long_as_the_cache_is_not(name: str) -> None:
    net = build(name)
    shown = _shown(net)
    layers = zoo.paths(name).layer_list
    for later in (False, True):
        for number in range(zoo.LAYERS):
            leaves = {key[4] for key in shown if key[:3] == (later, f"{layers}.{number}", "output")}
            assert leaves & {(), (0,)}
        assert (later, "", "output", 0, ("logits",)) in shown
    for later, path, _, _, leaf in shown:
        assert not (later and "mask" in str(leaf)), path


def test_a_model_that_does_not_pass_the_trial_of_logits_offers_nothing() -> None:
    assert _shown(build("llama dynamic")) is None
    net: Any = zoo.build("gpt2")
    net.train()
    assert _shown(net) is None


class Aside(nn.Module):
    """What it returns is thrown away by its caller, and has something of all rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.sum(0, keepdim=True)


class Beside(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.aside = Aside()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.aside(x)
        return self.inner(x)


def test_a_site_that_sees_its_neighbours_is_not_offered_and_the_others_are() -> None:
    net: Any = zoo.build("llama")
    net.model.layers[1].mlp = Beside(net.model.layers[1].mlp).eval()
    shown = _shown(net)
    for later in (False, True):
        assert (later, "model.layers.1.mlp.aside", "output", 0, ()) not in shown
        assert (later, "model.layers.1.mlp.aside", "inputs", 0, (0, 0)) in shown
        assert (later, "model.layers.1.mlp", "output", 0, ()) in shown


def test_whoever_uses_a_site_that_is_not_offered_runs_alone() -> None:
    net: Any = zoo.build("llama")
    net.model.layers[1].mlp = Beside(net.model.layers[1].mlp).eval()
    model = weft.LanguageModel(net)
    prompts = [torch.tensor(zoo.tokens(n, seed=n)) for n in (3, 5, 4)]

    def run(**options: Any) -> list[torch.Tensor]:
        found = []
        with model.generate(max_new_tokens=3, do_sample=False, **options) as tracer:
            for number, ids in enumerate(prompts):
                with tracer.invoke(ids):
                    if number == 1:
                        for _ in tracer.iter[2]:
                            found.append(model.model.layers[1].mlp.aside.output.save())
                    found.append(tracer.result.save())
        return found

    run()
    rows: list[int] = []
    hook = net.register_forward_pre_hook(
        lambda m, a, k: rows.append(len(k["input_ids"])), with_kwargs=True
    )
    got = run()
    hook.remove()
    assert rows == [1, 1, 1, 2, 2, 2]
    for one, other in zip(got, run(alone=True), strict=True):
        assert torch.equal(one, other)


def test_the_rows_of_a_step_are_told_by_formulas_alone() -> None:
    """The batch is as large as the number of heads, and the prompt as long as a head is wide."""
    net: Any = zoo.build("gpt2")
    model = weft.LanguageModel(net)
    stepping = _stepping(model)
    from weft.families.decoding import Decoding
    from weft.families.rehearsal import Layout, prompt_of
    from weft.families.sampling import Sampling

    one = Decoding(net, prompt_of(Layout(4, 8)), Sampling(max_new_tokens=3))
    for step, length in ((0, 8), (2, 1)):
        found = stepping.template(one, Site("transformer.h.1", "output", step=step), ())
        assert found is not None
        assert (found.dims, found.shape) == ((("B",), ("S",), ()), (4, length, 32))
    assert stepping.template(one, Site("transformer.h.1", "output", step=1), (5,)) is None


def test_nobody_remembers_a_model_that_is_gone() -> None:
    net: Any = zoo.build("gpt2")
    assert _shown(net)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
