"""Many prompts: a batch, invokes of different lengths, and values from one to another.

A list is one batch, padded. Each invoke is a prompt by itself, whatever shares the pass with it.
"""

import torch

from weft import LanguageModel, save
from weft.testing import tiny_path

PROMPTS = [
    "The capital of France is",
    "The capital of the country of Pompeii is",
    "five plus eight equals",
]

model = LanguageModel(tiny_path())
layers = model.model.layers

with model.trace(PROMPTS):
    batch = model.lm_head.output[:, -1].save()  # [prompt, vocab]
    states = layers[2].output.save()  # [prompt, pos, d_model], padded on the left

singly = []
with model.trace() as tracer:
    for prompt in PROMPTS:
        with tracer.invoke(prompt):
            singly.append(model.lm_head.output[0, -1])
    with tracer.invoke():  # all of them
        average = layers[2].output[:, -1].mean(0).save()
    singly = save(singly)

with model.trace() as tracer:
    with tracer.invoke(PROMPTS[0]):
        answer = layers[1].output[:, -1]
    with tracer.invoke(PROMPTS[1]):
        layers[1].output[:, -1] = answer
        swapped = model.lm_head.output[0, -1].save()

answers = [model.tokenizer.decode(row.argmax()) for row in batch]

if __name__ == "__main__":
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        print(f"  {prompt} {answer}")
    gap = (batch - torch.stack(singly)).abs().max()
    print(f"  largest difference between batch and single: {gap:.1e}")
    patched = model.tokenizer.decode(swapped.argmax())
    print(f"  {PROMPTS[1]} {patched}, with the end of the first")
