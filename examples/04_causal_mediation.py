"""Causal mediation: how much of a change of the prompt goes through which module?

The total effect is that of the other prompt. The indirect effect of a module is that of its output
alone, in a run that is else untouched; its direct effect is what is left when it is held still.
"""

import torch

from weft import LanguageModel
from weft.testing import tiny_path

BASE, OTHER = "The capital of Spain is", "The capital of Italy is"

model = LanguageModel(tiny_path())
layers = model.model.layers
madrid, rome = [model.tokenizer.encode(w, add_special_tokens=False)[0] for w in ("Madrid", "Rome")]


def answer(logits):
    """The log odds of Rome over Madrid."""
    return logits[0, -1, rome] - logits[0, -1, madrid]


modules = [(kind, number) for kind in ("self_attn", "mlp") for number in range(len(layers))]
base_out, other_out = {}, {}


def output_of(kind, number):
    """The tensor that a module adds to the stream; attention also returns its weights."""
    module = getattr(layers[number], kind)
    return module.output[0] if kind == "self_attn" else module.output


with model.trace() as tracer:
    with tracer.invoke(BASE):
        for kind, number in modules:
            base_out[kind, number] = output_of(kind, number).save()
        base = answer(model.lm_head.output).save()
    with tracer.invoke(OTHER):
        for kind, number in modules:
            other_out[kind, number] = output_of(kind, number).save()
        other = answer(model.lm_head.output).save()

total = other - base
indirect, direct = torch.zeros(2, len(layers)), torch.zeros(2, len(layers))
for index, (kind, number) in enumerate(modules):
    place = divmod(index, len(layers))
    with model.trace(BASE):
        output_of(kind, number)[:] = other_out[kind, number]
        indirect[place] = answer(model.lm_head.output) - base
    with model.trace(OTHER):
        output_of(kind, number)[:] = base_out[kind, number]
        direct[place] = answer(model.lm_head.output) - base

if __name__ == "__main__":
    print(f"total effect {total:.2f}")
    for row, kind in enumerate(("attention", "mlp")):
        for number in range(len(layers)):
            print(f"  {kind:9} {number}: indirect {indirect[row, number]:6.2f}, "
                  f"direct {direct[row, number]:6.2f}")  # fmt: skip
