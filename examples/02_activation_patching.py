"""Activation patching: where in the model does it stand who gets the ring?

Two prompts differ in one name. Activations of the clean run are put into the corrupted run, one
layer and position at a time; how much of the answer comes back is the measure.
"""

import torch

from weft import LanguageModel, save
from weft.testing import tiny_path

CLEAN = "While Alice met Hugo, Alice finally tried to give a ring from Felix to"
CORRUPTED = "While Alice met Hugo, Hugo finally tried to give a ring from Felix to"

model = LanguageModel(tiny_path())
layers = model.model.layers
right, wrong = [model.tokenizer.encode(w, add_special_tokens=False)[0] for w in ("Hugo", "Alice")]
positions = len(model.tokenizer(CLEAN)["input_ids"])


def difference(logits):
    """How much more likely the right name is than the wrong one."""
    return logits[0, -1, right] - logits[0, -1, wrong]


with model.trace(CLEAN):
    clean_states = save([layer.output for layer in layers])
    clean = difference(model.lm_head.output).save()

with model.trace(CORRUPTED):
    corrupted = difference(model.lm_head.output).save()

patched = torch.zeros(len(layers), positions)
for number, layer in enumerate(layers):
    with model.trace() as tracer:  # all positions of a layer in one block
        for position in range(positions):
            with tracer.invoke(CORRUPTED):
                layer.output[:, position] = clean_states[number][:, position]
                patched[number, position] = difference(model.lm_head.output)

recovered = (patched - corrupted) / (clean - corrupted)  # 0: as corrupted, 1: as clean

if __name__ == "__main__":
    tokens = [model.tokenizer.decode(t) for t in model.tokenizer(CLEAN)["input_ids"]]
    print(f"clean {clean:.2f}, corrupted {corrupted:.2f}; recovered by layer:")
    for position, token in enumerate(tokens):
        row = " ".join(f"{value:6.2f}" for value in recovered[:, position])
        print(f"  {token:>10} {row}")
