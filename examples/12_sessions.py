"""A session: a probe learns from values that no trace has saved, and a vector to steer by it.

Which country is meant is read from the stream; then a vector is trained, through the frozen model,
that makes the probe and the model's answer those of another one.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from weft import LanguageModel
from weft.testing import tiny_path

LAYER, STEPS = 1, 12
COUNTRIES = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid"}
PROMPT, WANTED = "The capital of France is", "Italy"

torch.manual_seed(0)
model = LanguageModel(tiny_path())
layer = model.model.layers[LAYER]
target = model.tokenizer.encode(COUNTRIES[WANTED], add_special_tokens=False)[0]

probe = nn.Linear(model.config.hidden_size, len(COUNTRIES))
vector = nn.Parameter(torch.zeros(model.config.hidden_size))
labels = torch.arange(len(COUNTRIES))
probe_losses, losses = [], []

with model.session():
    streams = []
    for country in COUNTRIES:
        with model.trace(f"The capital of {country} is"):
            streams.append(layer.output[0, -1])

    optimizer = torch.optim.Adam(probe.parameters(), lr=0.02)
    for _ in range(STEPS):  # between traces they are tensors
        optimizer.zero_grad()
        loss = cross_entropy(probe(torch.stack(streams)), labels)
        loss.backward()
        optimizer.step()
        probe_losses.append(loss.item())
    guessed = probe(torch.stack(streams)).argmax(-1)

    optimizer = torch.optim.Adam([vector], lr=1.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with model.trace(PROMPT):
            layer.output[:, -1] += vector
            read = probe(layer.output[:, -1])
            said = cross_entropy(model.lm_head.output[:, -1], torch.tensor([target]))
            loss = said + cross_entropy(read, labels[list(COUNTRIES).index(WANTED)][None])
            loss.backward(inputs=[vector])
        optimizer.step()
        losses.append(loss.item())

    with model.trace(PROMPT):
        layer.output[:, -1] = streams[1]  # Italy, as its trace left it
        patched = model.lm_head.output[0, -1].save()
    with model.trace(PROMPT):
        layer.output[:, -1] += vector
        steered = model.lm_head.output[0, -1].save()

if __name__ == "__main__":
    print("the probe reads:", [list(COUNTRIES)[number] for number in guessed])
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    print("steered:", model.tokenizer.decode(steered.argmax()))
    print("patched:", model.tokenizer.decode(patched.argmax()))
