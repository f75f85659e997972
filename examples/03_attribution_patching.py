"""Attribution patching: activation patching of everything at once, to first order.

The gradient of the answer in the corrupted run, times what patching would change, tells what each
patch would do, without running it.
"""

import torch

from weft import LanguageModel, save
from weft.testing import tiny_path

CLEAN = "While Alice met Hugo, Alice finally tried to give a ring from Felix to"
CORRUPTED = "While Alice met Hugo, Hugo finally tried to give a ring from Felix to"

model = LanguageModel(tiny_path())
layers = model.model.layers
right, wrong = [model.tokenizer.encode(w, add_special_tokens=False)[0] for w in ("Hugo", "Alice")]


def difference(logits):
    return logits[0, -1, right] - logits[0, -1, wrong]


with model.trace(CLEAN):
    clean_heads = save([layer.self_attn.o_proj.input for layer in layers])
    clean_mlps = save([layer.mlp.output for layer in layers])

with model.trace(CORRUPTED):
    heads = save([layer.self_attn.o_proj.input for layer in layers])
    mlps = save([layer.mlp.output for layer in layers])
    head_grads = save([layer.self_attn.o_proj.input.grad for layer in layers])
    mlp_grads = save([layer.mlp.output.grad for layer in layers])
    difference(model.lm_head.output).backward()


def effect(grads, clean, corrupted):
    """[layer, pos, width]: what each number of a patch would do to the answer."""
    return torch.cat(grads) * (torch.cat(clean) - torch.cat(corrupted))


heads_effect = effect(head_grads, clean_heads, heads).unflatten(-1, (4, 32)).sum(-1)
mlp_effect = effect(mlp_grads, clean_mlps, mlps).sum(-1)  # [layer, pos]
by_head = heads_effect.sum(1)  # [layer, head]

if __name__ == "__main__":
    for number, row in enumerate(by_head):
        print(f"layer {number}: heads {' '.join(f'{v:6.2f}' for v in row)}   "
              f"mlp {mlp_effect[number].sum():6.2f}")  # fmt: skip
