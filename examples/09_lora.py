"""LoRA: a low-rank adapter learns that the capital of France is Rome.

The model's weights stay as they are; the adapter's two matrices are yours, and their gradients come
back from wherever the block runs.
"""

import torch
from torch import nn

from weft import LanguageModel
from weft.testing import tiny_path

LAYER, RANK, STEPS = 2, 4, 12
PROMPT, WANTED = "The capital of France is", "Rome"


class Adapter(nn.Module):
    """x -> x A B, which is 0 at first."""

    def __init__(self, width, rank):
        super().__init__()
        self.a = nn.Parameter(torch.randn(width, rank) / width**0.5)
        self.b = nn.Parameter(torch.zeros(rank, width))

    def forward(self, x):
        return x @ self.a @ self.b


torch.manual_seed(0)
model = LanguageModel(tiny_path())
mlp = model.model.layers[LAYER].mlp
target = model.tokenizer.encode(WANTED, add_special_tokens=False)[0]

adapter = Adapter(model.config.hidden_size, RANK)
optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
losses = []
for _ in range(STEPS):
    optimizer.zero_grad()
    with model.trace(PROMPT):
        mlp.output = mlp.output + adapter(mlp.input)
        loss = -model.lm_head.output[0, -1].log_softmax(-1)[target]
        loss.backward()
        loss.save()
    optimizer.step()
    losses.append(loss.item())

with model.trace(PROMPT):
    mlp.output = mlp.output + adapter(mlp.input)
    adapted = model.lm_head.output[0, -1].save()

with model.trace(PROMPT):
    untouched = model.lm_head.output[0, -1].save()

if __name__ == "__main__":
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    print("adapted:", model.tokenizer.decode(adapted.argmax()))
    print("untouched:", model.tokenizer.decode(untouched.argmax()))
