"""Generation: reading, steering and stopping a model while it writes.

Step 0 is the prompt's forward, and each step makes one token. Edits outside of a step loop act at
every step; in a loop they act at its steps.
"""

from weft import LanguageModel, save
from weft.testing import tiny_path

PROMPT, NEW = "The capital of", 8
LAYER, STRENGTH, UNSURE = 2, 3.0, 0.1

model = LanguageModel(tiny_path())
layer = model.model.layers[LAYER]

with model.generate(PROMPT, max_new_tokens=NEW, do_sample=False) as tracer:
    confidence = save([])
    for _ in tracer.iter[:]:
        confidence.append(model.lm_head.output[0, -1].softmax(-1).max())
    plain = tracer.result.save()

with model.trace() as tracer:  # a direction, from one country to another
    with tracer.invoke("The capital of Italy"):
        towards = layer.output[0, -1]
    with tracer.invoke("The capital of France"):
        away = layer.output[0, -1]
    direction = (towards - away).save()

with model.generate(PROMPT, max_new_tokens=NEW, do_sample=False) as tracer:
    layer.output[:, -1] += STRENGTH * direction  # at every step
    steered = tracer.result.save()

choice = min(range(len(confidence)), key=lambda step: float(confidence[step]))
with model.generate(PROMPT, max_new_tokens=NEW, do_sample=False) as tracer:
    states = save([])
    for step in tracer.iter[:]:  # `step` is an int
        if step == choice:
            layer.output[:, -1] += STRENGTH * direction
        states.append(layer.output[0, -1])
    pinned = tracer.result.save()

with model.generate(PROMPT, max_new_tokens=NEW, do_sample=False) as tracer:
    tracer.stop_if(model.lm_head.output[0, -1].softmax(-1).max() < UNSURE)
    stopped = tracer.result.save()

if __name__ == "__main__":
    print("  confidence:", [round(float(one), 2) for one in confidence])
    for name in ("plain", "steered", "pinned", "stopped"):
        print(f"  {name + ':':10}", model.tokenizer.decode(globals()[name][0]))
