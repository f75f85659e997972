"""Distributed alignment search: in which subspace does the model keep which country is meant?

A rotation is learnt. In its first directions the stream of a source prompt replaces that of the
base prompt, and the answer should become the source's.
"""

import torch
from torch import nn

from weft import LanguageModel
from weft.testing import tiny_path

LAYER, POSITION, SUBSPACE, STEPS = 1, -1, 16, 10
PAIRS = [("France", "Italy", "Rome"), ("Spain", "France", "Paris"), ("Italy", "Spain", "Madrid")]

torch.manual_seed(0)
model = LanguageModel(tiny_path())
layer = model.model.layers[LAYER]
width = model.config.hidden_size

rotation = nn.Linear(width, width, bias=False)
nn.init.orthogonal_(rotation.weight)
rotation = nn.utils.parametrizations.orthogonal(rotation, use_trivialization=False)
optimizer = torch.optim.Adam(rotation.parameters(), lr=1e-2)


def prompt(country):
    return f"The capital of {country} is"


def swapped(base, source, turn):
    """The base's stream, with the source's part in the subspace; `turn` is orthogonal."""
    own, other = base @ turn.T, source @ turn.T
    mixed = torch.cat([other[..., :SUBSPACE], own[..., SUBSPACE:]], -1)
    return mixed @ turn


losses = []
for _ in range(STEPS):
    optimizer.zero_grad()
    for base, source, answer in PAIRS:
        token = model.tokenizer.encode(answer, add_special_tokens=False)[0]
        turn = rotation.weight
        with model.trace() as tracer:
            with tracer.invoke(prompt(source)):
                from_source = layer.output[:, POSITION]
            with tracer.invoke(prompt(base)):
                own = layer.output[:, POSITION].clone()  # its gradient needs it as it was
                layer.output[:, POSITION] = swapped(own, from_source, turn)
                loss = -model.lm_head.output[0, -1].log_softmax(-1)[token]
                loss.backward()
                loss.save()
        losses.append(loss.item())
    optimizer.step()

first, last = sum(losses[: len(PAIRS)]), sum(losses[-len(PAIRS) :])

if __name__ == "__main__":
    print(f"loss {first:.2f} -> {last:.2f}")
