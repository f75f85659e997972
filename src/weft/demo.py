"""The demo: the main job, on the tiny trained model that ships with Weft.

Reads every layer (a logit lens), patches activations of a clean run into a corrupted one, steers,
shows the recorded graph with its plan, and says where the time went. Uses the public API only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

import weft
from weft.testing import tiny_path
from weft.testing.corpus import COUNTRIES, ioi_pairs

FACT = "The capital of France is"
SHADES = " .:-=+*#%@"


def demo() -> None:
    """Prints the whole tour."""
    torch.set_num_threads(1)  # the model is tiny: threads would only wait for each other
    clock = Clock()
    with clock("build the tree (no weights)"):
        model = weft.LanguageModel(tiny_path())
    with clock("load the weights"), torch.no_grad():
        net = model.dispatch()
    layers = len(model.model.layers)
    title(f"The model: {layers} layers, {sum(p.numel() for p in net.parameters()):,} parameters")
    with clock("logit lens"):
        lens(model, FACT)
        lens(model, "five plus eight equals")
    with clock("patching, layer by position"):
        patching(model)
    with clock("steering"):
        steering(model)
    graph(model)
    timing(model, net, clock)


def lens(model: weft.LanguageModel, prompt: str) -> None:
    """What the model would say after each layer."""
    title(f"Logit lens: {prompt!r}")
    with model.trace(prompt):
        reads = [model.lm_head(model.model.norm(layer.output)) for layer in model.model.layers]
        probs = weft.save(torch.stack(reads)[:, 0, -1].softmax(-1))
    for number, row in enumerate(probs):
        best = row.topk(3)
        words = [model.tokenizer.decode(token) for token in best.indices]
        shown = "  ".join(f"{w} {p:.2f}" for w, p in zip(words, best.values, strict=True))
        print(f"  after layer {number}:  {shown}")


def patching(model: weft.LanguageModel) -> None:
    """Where the answer is: each activation of the clean run, put into the corrupted run."""
    pair = next(p for p in ioi_pairs(20, seed=5) if len(p.clean.split()) < 18)
    words = [model.tokenizer.decode(token) for token in model.tokenizer(pair.clean)["input_ids"]]
    right, wrong = (
        model.tokenizer.encode(w, add_special_tokens=False)[-1] for w in (pair.answer, pair.wrong)
    )
    title("Activation patching")
    print(f"  clean:     {pair.clean} ({pair.answer})")
    print(f"  corrupted: {pair.corrupt} ({pair.wrong})")

    def answer() -> torch.Tensor:
        logits = model.lm_head.output[0, -1]
        return logits[right] - logits[wrong]

    with model.trace(pair.clean):
        clean = weft.save([layer.output for layer in model.model.layers])
        high = weft.save(answer())
    with model.trace(pair.corrupt):
        low = weft.save(answer())
    grid = torch.zeros(len(clean), len(words))
    for number, layer in enumerate(model.model.layers):
        for position in range(len(words)):
            with model.trace(pair.corrupt):
                layer.output[:, position] = clean[number][:, position]
                grid[number, position] = answer()
    share = (grid - low) / (high - low)
    print(f"  logit difference: clean {high:+.2f}, corrupted {low:+.2f}")
    for number, row in enumerate(share):
        cells = "".join(
            shade(float(x)).center(max(len(w), 2) + 1) for x, w in zip(row, words, strict=True)
        )
        print(f"  layer {number} {cells}")
    print("          " + "".join(w.center(max(len(w), 2) + 1) for w in words))
    layer, position = divmod(int(share.argmax()), len(words))
    after = float(grid.flatten()[share.argmax()])
    says = pair.answer if after > 0 else pair.wrong
    print(f"  patching {words[position]!r} (position {position}) after layer {layer}")
    print(f"  turns the answer from {pair.wrong} ({low:+.2f}) to {says} ({after:+.2f})")


def steering(model: weft.LanguageModel) -> None:
    """Adds a direction, found on ten countries, to prompts about others."""
    title("Steering: from capitals to languages")
    middle = model.model.layers[1]

    def last(prompts: list[str]) -> torch.Tensor:
        with model.trace(prompts):
            there = middle.output[:, -1].mean(0).save()
        return there

    known, others = COUNTRIES[:10], COUNTRIES[10:14]
    direction = last([f"The language of {c.name} is" for c in known]) - last(
        [f"The capital of {c.name} is" for c in known]
    )
    for country in others:
        prompt = f"The capital of {country.name} is"
        answers = []
        for strength in (0.0, 1.0):
            with model.trace(prompt):
                middle.output[:, -1] += strength * direction
                probs = model.lm_head.output[0, -1].softmax(-1).save()
            best = int(probs.argmax())
            answers.append(f"{model.tokenizer.decode(best)} {float(probs[best]):.2f}")
        print(f"  {prompt:<32} {answers[0]:<18} steered: {answers[1]}")


def graph(model: weft.LanguageModel) -> None:
    """One experiment as data: its graph, and what it costs before it runs."""
    title("One experiment as a graph")
    with model.trace(FACT) as tracer:
        model.model.layers[1].mlp.output[:, -1] *= 0.5
        model.model.layers[2].output.save("h")
    print(indent(str(tracer.graph)))
    print(indent(str(tracer.plan())))
    print(f"  the pass ended at: {tracer.ended or 'the end of the model'}")
    print(f"  hash: {tracer.graph.hash[:16]}...")


def timing(model: weft.LanguageModel, net: torch.nn.Module, clock: Clock) -> None:
    """The time of each stage, and an edit with a save beside the bare forward."""
    title("Time")
    for name, seconds in clock.times.items():
        print(f"  {name:<30} {1e3 * seconds:9.1f} ms")
    ids = torch.tensor([model.tokenizer(FACT)["input_ids"]])

    def bare() -> None:
        with torch.no_grad():
            net(input_ids=ids, use_cache=False)

    def traced() -> None:
        with model.trace(ids):
            model.model.layers[1].mlp.output[:, -1] *= 0.5
            model.lm_head.output.save()

    first, second = paired(bare, traced)
    print(f"  {'bare forward':<30} {1e3 * first:9.2f} ms")
    print(f"  {'one edit and one save':<30} {1e3 * second:9.2f} ms  ({second / first:.2f} x)")


def paired(first, second, rounds: int = 40) -> tuple[float, float]:
    """Median seconds of two functions, measured in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, into in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            into.append(time.perf_counter() - start)
    return median(times[0][5:]), median(times[1][5:])


class Clock:
    """Collects how long named stages took."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.times[name] = time.perf_counter() - start


def shade(share: float) -> str:
    """A character, darker for a larger share between 0 and 1."""
    return SHADES[round(min(max(share, 0.0), 1.0) * (len(SHADES) - 1))]


def title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
