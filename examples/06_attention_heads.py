"""Heads of attention, one by one: what they give, what happens without them, what they say.

A head's output lies in its columns of what the output projection gets.
"""

import torch
from einops import rearrange

from weft import LanguageModel, save
from weft.testing import tiny_path

PROMPT = "While Alice met Hugo, Alice finally tried to give a ring from Felix to"
HEADS = 4

model = LanguageModel(tiny_path())
layers = model.model.layers
right, wrong = [model.tokenizer.encode(w, add_special_tokens=False)[0] for w in ("Hugo", "Alice")]


def by_head(z):
    return rearrange(z, "batch pos (head d) -> batch pos head d", head=HEADS)


with model.trace(PROMPT):
    norms, said = [], []
    for layer in layers:
        z = by_head(layer.self_attn.o_proj.input)
        norms.append(z[0, -1].norm(dim=-1))
        weight = rearrange(layer.self_attn.o_proj.weight, "d (head e) -> head e d", head=HEADS)
        each = torch.einsum("hd,hde->he", z[0, -1], weight)  # what each head adds to the stream
        logits = model.lm_head(model.model.norm(each))
        said.append(logits[:, right] - logits[:, wrong])
    norms, said = save(norms), save(said)
    base = model.lm_head.output[0, -1].save()

without = torch.zeros(len(layers), HEADS)
for number, layer in enumerate(layers):
    for head in range(HEADS):
        with model.trace(PROMPT):
            by_head(layer.self_attn.o_proj.input)[:, :, head] = 0
            logits = model.lm_head.output[0, -1]
            without[number, head] = logits[right] - logits[wrong]

effect = without - (base[right] - base[wrong])  # [layer, head]

if __name__ == "__main__":
    for number, row in enumerate(effect):
        print(f"layer {number}, without each head: {' '.join(f'{v:6.2f}' for v in row)}")
