"""A logit lens: what would the model say if it had to answer after each layer?

The stream after every layer goes through the model's own last norm and head.
"""

import torch

from weft import LanguageModel, save
from weft.testing import tiny_path

PROMPT = "The capital of the country of Versailles is"

model = LanguageModel(tiny_path())
layers = model.model.layers

with model.trace(PROMPT):
    lens = []
    for layer in layers:
        logits = model.lm_head(model.model.norm(layer.output))
        lens.append(logits.softmax(-1))
    lens = save(lens)

probabilities = torch.cat(lens)  # [layer, pos, vocab]
best = probabilities.max(-1)  # values and indices, each [layer, pos]
words = [[model.tokenizer.decode(token) for token in row] for row in best.indices]

if __name__ == "__main__":
    print(f"{PROMPT!r}, at its last position:")
    for number, row in enumerate(words):
        print(f"  after layer {number}: {row[-1]:12} {best.values[number, -1]:.2f}")
