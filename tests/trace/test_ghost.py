"""Learning shapes does not fire the hooks that a user has on the model."""

from __future__ import annotations

import torch

import weft
from tests.families.zoo import build
from weft.signatures.ghost import without_hooks


def test_a_users_hook_sees_real_passes_only() -> None:
    net = build("gpt2")
    seen: list[torch.Tensor] = []
    handle = net.transformer.h[0].register_forward_hook(lambda m, a, out: seen.append(out))
    model = weft.LanguageModel(net)
    ids = torch.tensor([[1, 2, 3]])
    with model.trace(ids):
        saved = model.transformer.h[0].output.save()
    handle.remove()
    assert [type(one) for one in seen] == [torch.Tensor]
    assert torch.equal(seen[0], saved)


def test_a_model_without_hooks_is_itself() -> None:
    net = build("llama")
    assert without_hooks(net) is net


def test_the_copy_has_the_same_weights_on_meta_and_ties_them() -> None:
    net = build("gpt2")
    handle = net.lm_head.register_forward_pre_hook(lambda m, a: None)
    ghost = without_hooks(net)
    handle.remove()
    assert ghost is not net
    assert {p.device.type for p in ghost.parameters()} == {"meta"}
    assert [n for n, _ in ghost.named_parameters()] == [n for n, _ in net.named_parameters()]
    assert (ghost.lm_head.weight is ghost.transformer.wte.weight) == (
        net.lm_head.weight is net.transformer.wte.weight
    )
    assert not ghost.lm_head._forward_pre_hooks


def test_a_model_that_cannot_be_copied_is_learnt_as_it_is() -> None:
    net = build("gpt2")
    net.generator = (x for x in ())  # generators refuse deepcopy
    handle = net.lm_head.register_forward_pre_hook(lambda m, a: None)
    assert without_hooks(net) is net
    handle.remove()
