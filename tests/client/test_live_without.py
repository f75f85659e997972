"""A client that has neither the weights nor `transformers`: all that it needs comes as data."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

from tests.language.hooks import with_hooks
from weft.testing.same import bounded

PROMPTS = ["The capital of France is", "2 plus 3 is", "When Mary and John went to the store, John"]

CLIENT = """
import json, sys

MISSING = ("transformers", "safetensors", "huggingface_hub", "accelerate")

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import weft

url, prompts = sys.argv[1], json.loads(sys.argv[2])
model = weft.LanguageModel("tiny", remote=url)
config = model.config
out = {"tree": str(model), "layers": config.num_hidden_layers, "kind": config.model_type}
for n, prompt in enumerate(prompts):
    with model.trace(prompt) as tracer:
        streams = [layer.output for layer in model.model.layers]
        model.model.layers[2].mlp.output[:, -1] *= 0.5
        lens = [model.lm_head(model.model.norm(h))[:, -1] for h in streams]
        weft.save(lens, name="lens")
        attention = model.model.layers[1].self_attn.o_proj.input.save("attention")
        model.lm_head.output.save("logits")
    assert attention.shape == (1, len(tracer.mask[0]), config.hidden_size), attention.shape
    out[str(n)] = {name: [t.tolist() for t in (value if isinstance(value, list) else [value])]
                   for name, value in tracer.results.items()}
    out[str(n)]["ids"] = model.tokenizer(prompt)["input_ids"]
with model.trace(prompts):
    last = model.lm_head.output[:, -1].save()
out["last"] = last.tolist()
with model.trace([{"role": "user", "content": prompts[1]}]):  # the template is the server's
    chat = model.model.embed_tokens.input.save()
out["chat"] = chat[0].tolist()
out["next"] = model.tokenizer.decode(last[0].argmax(-1))
with model.trace(prompts[0]) as tracer:
    model.model.layers[0].output.save("h")
tracer.graph.save(sys.argv[3])
out["again"] = weft.Experiment.load(sys.argv[3]).run(model, prompts[0])["h"].tolist()
assert not [name for name in sys.modules if name.partition(".")[0] in MISSING]
print(json.dumps(out))
"""


def test_a_client_needs_neither_weights_nor_transformers(
    live: Any, tiny: Any, tokenizer: Any, tmp_path: Any
) -> None:
    script = [sys.executable, "-W", "error", "-c", CLIENT]
    asked = [live.url, json.dumps(PROMPTS), str(tmp_path / "graph.weft")]
    done = subprocess.run(script + asked, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["layers"] == 4 and out["kind"] == "llama" and "LlamaDecoderLayer" in out["tree"]
    for n, prompt in enumerate(PROMPTS):
        _check(out[str(n)], tiny, tokenizer(prompt)["input_ids"])
    chat = [{"role": "user", "content": PROMPTS[1]}]
    template = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    assert out["chat"] == template["input_ids"]
    last = torch.tensor(out["last"])
    for row, prompt in enumerate(PROMPTS):  # alone, without padding
        with torch.no_grad():
            alone = tiny(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        bounded(last[row], alone)
    assert len(last) == len(PROMPTS) and "Paris" in out["next"]
    seen = with_hooks(
        tiny, {"model.layers.0.output": None}, **tokenizer(PROMPTS[0], return_tensors="pt")
    )
    bounded(torch.tensor(out["again"]), seen["model.layers.0.output"])


def _check(got: dict[str, Any], tiny: Any, ids: list[int]) -> None:
    """The same experiment with plain hooks."""

    def halved(h: torch.Tensor) -> torch.Tensor:
        return torch.cat([h[:, :-1], h[:, -1:] * 0.5], 1)

    streams = [f"model.layers.{n}.output" for n in range(4)]
    seen = with_hooks(
        tiny,
        {
            **dict.fromkeys(streams),
            "model.layers.2.mlp.output": halved,
            "model.layers.1.self_attn.o_proj.input": None,
        },
        torch.tensor([ids]),
    )
    assert got["ids"] == ids
    with torch.no_grad():
        lens = [tiny.lm_head(tiny.model.norm(seen[path]))[:, -1] for path in streams]
    bounded([torch.tensor(t) for t in got["lens"]], lens)
    bounded(torch.tensor(got["attention"][0]), seen["model.layers.1.self_attn.o_proj.input"])
    bounded(torch.tensor(got["logits"][0]), seen.result.logits)
