"""Models with eager attention for the tests of sources, and the same patched by hand."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch

from tests.families import zoo

ATTENTION = {
    "gpt2": "transformer.h.{}.attn",
    "llama": "model.layers.{}.self_attn",
    "qwen3": "model.layers.{}.self_attn",
    "gemma2": "model.layers.{}.self_attn",
    "gpt_neox": "gpt_neox.layers.{}.attention",
    "mixtral": "model.layers.{}.self_attn",
    "opt": "model.decoder.layers.{}.self_attn",
}
IDS = torch.tensor(zoo.tokens(9, seed=1))
NEW = 4
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
OWN = {**GREEDY, "pad_token_id": 0, "min_new_tokens": None}
SHORT = torch.tensor(zoo.tokens(5, seed=4))


@cache
def eager(name):
    net: Any = zoo.build(name)
    net.set_attn_implementation("eager")
    return net


_OPENED: dict[tuple[str, int], Any] = {}


def opened(place, net):
    """A handle on a model, in the place where a test runs."""
    key = str(place), id(net)
    if key not in _OPENED:
        _OPENED[key] = place.language(net)
    return _OPENED[key]


def logits_of(net, ids=IDS):
    with torch.no_grad():
        return net(ids).logits


def patterns(net):
    with torch.no_grad():
        return net(IDS, output_attentions=True).attentions


class patched:
    """`net` in which the softmax of layer `number` is followed by `change`, by hand."""

    def __init__(self, net, number, change):
        self._home: Any = importlib.import_module(type(net).__module__)
        self._net, self._number, self._change = net, number, change

    def __enter__(self):
        self._real = self._home.nn
        self._seen = 0
        self._home.nn = self._Stand(self)
        return self._net

    def __exit__(self, *error):
        self._home.nn = self._real

    class _Stand:
        """`torch.nn`, but for one function."""

        def __init__(self, patch):
            self._patch = patch
            self.functional = self

        def softmax(self, x, **options):
            patch = self._patch
            made = patch._real.functional.softmax(x, **options)
            patch._seen += 1
            return patch._change(made) if patch._seen == patch._number + 1 else made

        def __getattr__(self, name):
            real = self._patch._real
            return getattr(real.functional, name, None) or getattr(real, name)


def attention_of(model, family, number=1):
    return model.get(ATTENTION[family].format(number)).source.attention_interface_0


def no_first(pattern):
    pattern = pattern.clone()
    pattern[:, 0] = 0
    return pattern


class by_hand:
    """`net` whose attention is changed by hand at each step of a generation.

    `pattern(path, step, softmax)` gives what the softmax is to give, `given(path, step, tensors)`
    query, key and value; or None, where nothing changes. A step is a call of the module at `path`.
    `seen[path, step]` are the patterns that it went on with.
    """

    def __init__(self, net, pattern=None, given=None):
        self._home: Any = importlib.import_module(type(net).__module__)
        self._change = {"pattern": pattern, "given": given}
        self._paths = {module: path for path, module in net.named_modules()}
        self._counts = {}
        self.seen = {}

    def __enter__(self):
        self._nn, self._real = self._home.nn, self._home.eager_attention_forward
        self._home.nn = self
        self._home.eager_attention_forward = self._attention
        self.functional = self
        return self

    def __exit__(self, *error):
        self._home.nn, self._home.eager_attention_forward = self._nn, self._real

    def _attention(self, module, *args, **options):
        path = self._paths[module]
        self._now = path, self._counts.get(path, 0)
        self._counts[path] = self._now[1] + 1
        if self._change["given"] is not None:
            found = self._change["given"](*self._now, args[:3])
            args = args if found is None else (*found, *args[3:])
        return self._real(module, *args, **options)

    def softmax(self, x, **options):
        made = self._nn.functional.softmax(x, **options)
        if self._change["pattern"] is not None:
            found = self._change["pattern"](*self._now, made)
            made = made if found is None else found
        self.seen[self._now] = made.clone()
        return made

    def __getattr__(self, name):
        return getattr(self._nn.functional, name, None) or getattr(self._nn, name)


def own(net: Any, ids: torch.Tensor = IDS, **options: Any) -> Any:
    """What `generate` returns: `sequences`, and `attentions[step][layer]`."""
    with torch.no_grad():
        return net.generate(
            ids, output_attentions=True, return_dict_in_generate=True, **{**OWN, **options}
        )


def no_head(module, step, pattern):
    if module == ATTENTION["gpt2"].format(1):
        pattern = pattern.clone()
        pattern[:, 0] = 0
        return pattern
    return None
