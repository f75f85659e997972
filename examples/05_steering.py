"""Steering: a direction made of two prompts moves the answer to a third.

The difference of what two prompts leave in the stream is added to another run, weak and strong.
"""

import torch

from weft import LanguageModel, save
from weft.testing import tiny_path

LAYER, POSITION = 1, -1  # where the country is known, and the answer is not yet said
TOWARDS, AWAY, PROMPT = (f"The capital of {name} is" for name in ("Italy", "France", "France"))
STRENGTHS = (0.0, 0.5, 1.0)

model = LanguageModel(tiny_path())
layer = model.model.layers[LAYER]

with model.trace() as tracer:
    with tracer.invoke(TOWARDS):
        towards = layer.output[0, POSITION].save()
    with tracer.invoke(AWAY):
        away = layer.output[0, POSITION].save()

direction = towards - away
norms, steered = [], []
with model.trace() as tracer:
    for strength in STRENGTHS:
        with tracer.invoke(PROMPT):
            layer.output[:, POSITION] += strength * direction
            norms.append(layer.output[0, POSITION].norm())
            steered.append(model.lm_head.output[0, -1].softmax(-1))
    norms, steered = save(norms), save(steered)

steered = torch.stack(steered)  # [strength, vocab]

if __name__ == "__main__":
    for strength, row in zip(STRENGTHS, steered, strict=True):
        best = row.topk(3)
        words = [model.tokenizer.decode(token) for token in best.indices]
        shown = [f"{word} {p:.2f}" for word, p in zip(words, best.values, strict=True)]
        print(f"  {strength:.1f}: {'  '.join(shown)}")
