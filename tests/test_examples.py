"""The scripts of `examples/`: each runs, here and on a server, and its numbers are those of hooks.

The oracle is the bare model with plain PyTorch hooks and autograd; where a script trains something,
the first steps are trained again by hand, and what was trained is put in place by hand.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.language.autograd import gradients
from tests.language.generated import generated
from tests.language.hooks import hook_count, with_hooks
from weft.testing import tiny_path
from weft.testing.same import bounded, moves

FOLDER = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))
Found = dict[str, Any]


@cache
def net() -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_path()).eval()


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_path())


def ids(text: str) -> torch.Tensor:
    return torch.tensor([tokenizer()(text)["input_ids"]])


def token(word: str) -> int:
    return tokenizer().encode(word, add_special_tokens=False)[0]


def layer(number: int, rest: str = "output") -> str:
    return f"model.layers.{number}.{rest}"


def last(text: str, hooks: Mapping[str, Callable[[Any], Any]] | None = None) -> torch.Tensor:
    """The logits at the last position."""
    return with_hooks(net(), dict(hooks or {}), ids(text)).result.logits[0, -1]


def put(where: Any, value: Any) -> Callable[[Any], None]:
    def hook(output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[where] = value

    return hook


def added(where: Any, value: Any) -> Callable[[Any], None]:
    def hook(output: Any) -> None:
        output[where] += value

    return hook


# -- the oracles: what each script must have found -------------------------------------------------


def logit_lens(found: Found) -> None:
    keys = [layer(n) for n in range(4)]
    seen = with_hooks(net(), dict.fromkeys(keys), ids(found["PROMPT"]))
    with torch.no_grad():
        model: Any = net()
        lens = [model.lm_head(model.model.norm(seen[key])).softmax(-1) for key in keys]
    bounded(found["probabilities"], torch.cat(lens))
    assert found["words"][-1][-1] == "Paris"


def activation_patching(found: Found) -> None:
    right, wrong = token("Hugo"), token("Alice")
    clean = with_hooks(net(), {layer(n): None for n in range(4)}, ids(found["CLEAN"]))
    expected = torch.empty(4, found["positions"])
    for n in range(4):
        for position in range(found["positions"]):
            at = slice(None), position
            logits = last(found["CORRUPTED"], {layer(n): put(at, clean[layer(n)][at])})
            expected[n, position] = logits[right] - logits[wrong]
    bounded(found["patched"], expected)
    assert found["recovered"][0, 6] > 0.9 and found["recovered"][3, -1] > 0.9


def attribution_patching(found: Found) -> None:
    right, wrong = token("Hugo"), token("Alice")
    keys = [
        layer(n, f"{part}") for part in ("self_attn.o_proj.input", "mlp.output") for n in range(4)
    ]
    clean, corrupted = [
        with_hooks(net(), dict.fromkeys(keys), ids(found[name])) for name in ("CLEAN", "CORRUPTED")
    ]
    loss = lambda out: out.logits[0, -1, right] - out.logits[0, -1, wrong]
    grads = gradients(net(), keys, loss, ids(found["CORRUPTED"]))
    effects = [(grads[key] * (clean[key] - corrupted[key]))[0] for key in keys]
    heads = torch.stack(effects[:4]).unflatten(-1, (4, 32)).sum(-1)
    bounded(found["heads_effect"], heads)
    bounded(found["mlp_effect"], torch.stack(effects[4:]).sum(-1))


def causal_mediation(found: Found) -> None:
    base, other = found["BASE"], found["OTHER"]
    answer = lambda logits: logits[token("Rome")] - logits[token("Madrid")]
    keys = [layer(n, f"{kind}.output") for kind in ("self_attn", "mlp") for n in range(4)]
    of_base, of_other = [
        with_hooks(net(), dict.fromkeys(keys), ids(text)) for text in (base, other)
    ]
    start = answer(last(base))
    whole = (slice(None),) * 3
    tensor = lambda out: out[0] if isinstance(out, tuple) else out
    indirect = [answer(last(base, {k: put(whole, tensor(of_other[k]))})) - start for k in keys]
    direct = [answer(last(other, {k: put(whole, tensor(of_base[k]))})) - start for k in keys]
    bounded(found["total"], answer(last(other)) - start)
    bounded(found["indirect"], torch.stack(indirect).view(2, 4))
    bounded(found["direct"], torch.stack(direct).view(2, 4))


def steering(found: Found) -> None:
    key = layer(found["LAYER"])
    position = found["POSITION"]
    towards, away = [
        with_hooks(net(), {key: None}, ids(found[name]))[key][0, position]
        for name in ("TOWARDS", "AWAY")
    ]
    expected, norms = [], []
    for strength in found["STRENGTHS"]:
        push = strength * (towards - away)
        seen = with_hooks(net(), {key: added((slice(None), position), push)}, ids(found["PROMPT"]))
        expected.append(seen.result.logits[0, -1].softmax(-1))
        norms.append(seen[key][0, position].norm())
    bounded(
        [found["steered"], torch.stack(found["norms"])], [torch.stack(expected), torch.stack(norms)]
    )
    moves(found["steered"][2], found["steered"][0])


def attention_heads(found: Found) -> None:
    model: Any = net()
    right, wrong = token("Hugo"), token("Alice")
    keys = [layer(n, "self_attn.o_proj.input") for n in range(4)]
    seen = with_hooks(net(), dict.fromkeys(keys), ids(found["PROMPT"]))
    norms, said, without = [], [], torch.empty(4, 4)
    for n, key in enumerate(keys):
        z = seen[key][0, -1].view(4, 32)
        norms.append(z.norm(dim=-1))
        columns = model.model.layers[n].self_attn.o_proj.weight.detach().split(32, 1)
        with torch.no_grad():
            each = torch.stack([w @ part for w, part in zip(columns, z, strict=True)])
            logits = model.lm_head(model.model.norm(each))
        said.append(logits[:, right] - logits[:, wrong])
        for head in range(4):
            logits = last(found["PROMPT"], {key: put((..., slice(32 * head, 32 * head + 32)), 0)})
            without[n, head] = logits[right] - logits[wrong]
    bounded([torch.stack(found["norms"]), found["without"]], [torch.stack(norms), without])
    bounded(torch.stack(found["said"]), torch.stack(said))


def many_prompts(found: Found) -> None:
    prompts = found["PROMPTS"]
    alone = torch.stack([last(prompt) for prompt in prompts])
    bounded([found["batch"], torch.stack(found["singly"])], [alone, alone])
    keys = layer(1), layer(2)
    seen = [with_hooks(net(), dict.fromkeys(keys), ids(prompt)) for prompt in prompts]
    ends = torch.stack([one[layer(2)][0, -1] for one in seen])
    bounded([found["average"], found["states"][:, -1]], [ends.mean(0), ends])
    at = slice(None), -1
    bounded(found["swapped"], last(prompts[1], {layer(1): put(at, seen[0][layer(1)][at])}))
    moves(found["swapped"], alone[1])
    assert found["answers"] == ["Paris", "Rome", "thirteen"]


def sparse_autoencoder(found: Found) -> None:
    key, sae, whole = layer(found["LAYER"]), found["sae"], (slice(None),) * 3
    acts = [with_hooks(net(), {key: None}, ids(text))[key][0] for text in found["prompts"]]
    bounded(found["acts"], torch.cat(acts))
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    stream = with_hooks(net(), {key: None}, ids(found["PROMPT"]))[key]
    with torch.no_grad():
        features = sae.encode(stream)
        bounded(found["features"], features)
        bounded(found["spliced"], last(found["PROMPT"], {key: put(whole, sae(stream))}))
        rest = stream - sae(stream)
        features[:, -1, found["strongest"]] = 0
        ablated = last(found["PROMPT"], {key: put(whole, sae.decoder(features) + rest)})
    bounded(found["ablated"], ablated)
    moves(found["ablated"], last(found["PROMPT"]))


def lora(found: Found) -> None:
    adapter, target = found["adapter"], found["target"]
    mlp = net().get_submodule(layer(found["LAYER"], "mlp"))

    def logits(adapter: nn.Module) -> torch.Tensor:
        hook = lambda module, args, output: output + adapter(args[0])
        handle = mlp.register_forward_hook(hook)
        try:
            return net()(ids(found["PROMPT"])).logits[0, -1]
        finally:
            handle.remove()

    bounded(found["adapted"], logits(adapter).detach())
    bounded(found["untouched"], last(found["PROMPT"]))
    assert found["losses"][-1] < 0.1 * found["losses"][0]
    torch.manual_seed(0)  # the first two steps again, by hand
    again = type(adapter)(128, found["RANK"])
    optimizer = torch.optim.AdamW(again.parameters(), lr=0.05)
    for loss_found in found["losses"][:2]:
        loss = -logits(again).log_softmax(-1)[target]
        bounded(torch.tensor(loss_found), loss.detach())
        optimizer.zero_grad()
        loss.backward(inputs=list(again.parameters()))
        optimizer.step()


def alignment_search(found: Found) -> None:
    torch.manual_seed(0)  # the first round again, by hand
    linear: Any = nn.Linear(128, 128, bias=False)
    nn.init.orthogonal_(linear.weight)
    key, position = layer(found["LAYER"]), found["POSITION"]
    nn.utils.parametrizations.orthogonal(linear, use_trivialization=False)
    turn = linear.weight.detach()
    for (base, source, answer), loss in zip(found["PAIRS"], found["losses"], strict=False):
        streams = [
            with_hooks(net(), {key: None}, ids(f"The capital of {name} is"))[key][:, position]
            for name in (base, source)
        ]
        mixed = found["swapped"](*streams, turn)
        hooks = {key: put((slice(None), position), mixed)}
        expected = -last(f"The capital of {base} is", hooks).log_softmax(-1)[token(answer)]
        bounded(torch.tensor(loss), expected)
    eye = found["rotation"].weight.detach() @ found["rotation"].weight.detach().T
    assert (eye - torch.eye(128)).abs().max() < 1e-4
    assert found["last"] < 0.5 * found["first"]


def sessions(found: Found) -> None:
    key, at = layer(found["LAYER"]), (slice(None), -1)
    prompts = [f"The capital of {name} is" for name in found["COUNTRIES"]]
    streams = torch.stack([with_hooks(net(), {key: None}, ids(one))[key][0, -1] for one in prompts])
    torch.manual_seed(0)  # both trainings again, by hand
    probe, vector = nn.Linear(128, 3), nn.Parameter(torch.zeros(128))
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.02)
    for loss_found in found["probe_losses"]:
        loss = nn.functional.cross_entropy(probe(streams), torch.arange(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bounded(torch.tensor(loss_found), loss.detach())
    assert found["guessed"].tolist() == [0, 1, 2]
    optimizer, kept = torch.optim.Adam([vector], lr=1.0), {}

    def steer(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        moved = output[:, -1:] + vector
        kept["read"] = probe(moved[:, 0])
        return torch.cat([output[:, :-1], moved], 1)

    handle = net().get_submodule(f"model.layers.{found['LAYER']}").register_forward_hook(steer)
    try:
        for loss_found in found["losses"]:
            said = net()(ids(found["PROMPT"])).logits[:, -1]
            loss = nn.functional.cross_entropy(said, torch.tensor([found["target"]]))
            loss = loss + nn.functional.cross_entropy(kept["read"], torch.tensor([1]))
            bounded(torch.tensor(loss_found), loss.detach())
            (vector.grad,) = torch.autograd.grad(loss, [vector])
            optimizer.step()
    finally:
        handle.remove()
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    bounded(found["steered"], last(found["PROMPT"], {key: added(at, vector.detach())}))
    bounded(found["patched"], last(found["PROMPT"], {key: put(at, streams[1])}))


def generation(found: Found) -> None:
    key, prompt, steps = layer(found["LAYER"]), ids(found["PROMPT"]), range(found["NEW"])
    options = {"max_new_tokens": found["NEW"], "pad_token_id": None}

    def told(step: int, logits: torch.Tensor) -> None:
        return None

    plain = generated(net(), prompt, {"lm_head.output": told}, **options)
    logits = [plain["lm_head.output", step][0, -1] for step in steps]
    sure = torch.stack([one.softmax(-1).max() for one in logits])
    bounded([found["plain"], torch.stack(found["confidence"])], [plain.result, sure])
    towards, away = [
        with_hooks(net(), {key: None}, ids(f"The capital of {name}"))[key][0, -1]
        for name in ("Italy", "France")
    ]
    push = found["STRENGTH"] * (towards - away)

    def steered(at: Any) -> Any:
        def hook(step: int, output: Any) -> None:
            if step in at:
                (output[0] if isinstance(output, tuple) else output)[:, -1] += push

        return generated(net(), prompt, {key: hook}, **options)

    bounded(found["steered"], steered(steps).result)
    choice = int(sure.argmin())
    assert choice == found["choice"]
    pinned = steered([choice])
    bounded(found["pinned"], pinned.result)
    bounded(found["states"], [pinned[key, step][0, -1] for step in steps])
    assert not torch.equal(found["pinned"], found["plain"])
    until = next(n for n, one in enumerate(sure) if one < found["UNSURE"])
    bounded(found["stopped"], plain.result[:, : prompt.shape[1] + until])


ORACLES: dict[str, Callable[[Found], None]] = {
    "01_logit_lens": logit_lens,
    "02_activation_patching": activation_patching,
    "03_attribution_patching": attribution_patching,
    "04_causal_mediation": causal_mediation,
    "05_steering": steering,
    "06_attention_heads": attention_heads,
    "07_many_prompts": many_prompts,
    "08_sparse_autoencoder": sparse_autoencoder,
    "09_lora": lora,
    "10_distributed_alignment_search": alignment_search,
    "11_generation": generation,
    "12_sessions": sessions,
}

# -- they run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here() -> Any:
    return weft.LanguageModel(tiny_path())


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    from weft.testing.service import serve

    with serve({"tiny": tiny_path()}) as running:
        yield weft.LanguageModel(tiny_path(), remote=running.url)


def run(script: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> Found:
    """One handle for all scripts of a place: the source is the same, only where it runs is not."""
    monkeypatch.setattr(weft, "LanguageModel", {tiny_path(): model}.__getitem__)
    return runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("place", ["here", "server"])
def test_a_script_finds_what_hooks_find(script, place, request, monkeypatch, capsys):
    model = request.getfixturevalue(place)
    ORACLES[script.stem](run(script, model, monkeypatch))
    assert capsys.readouterr().out
    assert hook_count(net()) == 0


def test_every_script_has_an_oracle_and_a_row_in_the_page():
    assert [script.stem for script in SCRIPTS] == sorted(ORACLES)
    page = (FOLDER / "README.md").read_text()
    assert [name for name in ORACLES if page.count(f"({name}.py)") != 1] == []
