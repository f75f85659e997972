"""The fingerprint: equal where one graph means the same, and nowhere else."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from torch import nn

from tests.families import zoo
from weft.engine.fingerprint import fingerprint
from weft.engine.publish import know
from weft.families.loading import LoadOptions, Source, load
from weft.testing import tiny_path


def test_a_skeleton_and_its_model_have_one():
    known = know(tiny_path())
    assert known.skeleton.lm_head.weight.device.type == "meta"
    assert fingerprint(load(Source.of(tiny_path()), LoadOptions())) == known.fingerprint


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_numbers_do_not_count(name):
    one, other = zoo.build(name), zoo.build(name)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.mul_(2)
    assert fingerprint(one) == fingerprint(other)


def of_a_file(folder, text: str) -> nn.Module:
    """A module of a class `Thing` that stands in a file of its own."""
    path = folder / "thing.py"
    path.write_text(f"import torch\nfrom torch import nn\n\n{text}\n")
    spec = importlib.util.spec_from_file_location(f"thing_{folder.name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.Thing.__module__ = "thing"
    return module.Thing()


THING = """
def twice(x):
    return x * 2


class Thing(nn.Module):
    def forward(self, x):
        return twice(x) + 1
"""
TEXTS = {
    "the same": (THING, True),
    "a comment": (THING.replace("x * 2", "x * 2  # doubled"), True),
    "a docstring": (
        THING.replace("def forward(self, x):", 'def forward(self, x):\n        """x"""'),
        True,
    ),
    "the forward": (THING.replace("+ 1", "+ 2"), False),
    "what it calls": (THING.replace("* 2", "* 3"), False),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_of_a_class_counts(tmp_path, name, monkeypatch):
    text, same = TEXTS[name]
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    prints = []
    for number, body in enumerate((THING, text)):
        folder = tmp_path / f"f{number}"
        folder.mkdir()
        prints.append(fingerprint(of_a_file(folder, body)))
    assert (prints[0] == prints[1]) is same


CHANGES = {
    "a dtype": lambda net: net.to(torch.bfloat16),
    "one weight's dtype": lambda net: net.lm_head.to(torch.float64),
    "the mode": lambda net: net.train(),
    "one module's mode": lambda net: net.transformer.h[1].train(),
    "the attention kernel": lambda net: net.set_attn_implementation("eager"),
    "a number of the configuration": lambda net: setattr(net.config, "resid_pdrop", 0.7),
    "an option of a layer": lambda net: setattr(net.transformer.ln_f, "eps", 0.5),
    "a layer less": lambda net: net.transformer.h.pop(2),
    "a layer twice": lambda net: net.transformer.h.append(net.transformer.h[0]),
    "a module more": lambda net: net.add_module("more", nn.Identity()),
    "weights untied": lambda net: setattr(
        net.lm_head, "weight", nn.Parameter(net.lm_head.weight.detach().clone())
    ),
    "a buffer more": lambda net: net.register_buffer("mark", torch.zeros(1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_numbers_counts(name):
    before, after = zoo.build("gpt2"), zoo.build("gpt2")
    CHANGES[name](after)
    assert fingerprint(before) != fingerprint(after)


def test_where_it_is_from_does_not_count(tmp_path):
    net = zoo.build("llama")
    net.save_pretrained(tmp_path / "a")
    net.save_pretrained(tmp_path / "b")
    prints = {know(str(tmp_path / name)).fingerprint for name in ("a", "b")}
    assert prints == {fingerprint(net)}
