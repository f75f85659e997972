"""The demo: the main job, on the tiny trained model that ships with Weft.

Reads every layer (a logit lens), patches activations of a clean run into a corrupted one, steers,
and shows the recorded graph with its plan; then starts a server with the same model, runs the same
experiments there, and says whether the numbers agree, what travelled, and where the time went. Uses
the public API only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch

import weft
from weft.testing import same, tiny_path
from weft.testing.corpus import COUNTRIES, IoiPair, ioi_pairs
from weft.testing.process import served

FACT, SUM = "The capital of France is", "five plus eight equals"
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
    here = Lab(model)
    found = {}
    for name, experiment in EXPERIMENTS.items():
        with clock(name):
            found[name] = experiment(here)
        SHOWN[name](model, found[name])
    graph(model)
    timing(model, net, clock)
    elsewhere(found)


class Lab:
    """A model to experiment on, and the traces that were made."""

    def __init__(self, model: weft.LanguageModel) -> None:
        self.model = model
        self.traces: list[weft.Tracer] = []

    def trace(self, prompt: Any) -> weft.Tracer:
        self.traces.append(self.model.trace(prompt))
        return self.traces[-1]


# -- the experiments: what they compute, and how it is shown --------------------------------------


def lens(lab: Lab) -> list[torch.Tensor]:
    """What the model would say after each layer: probabilities `[layer, vocab]` of two prompts."""
    return [_lens(lab, prompt) for prompt in (FACT, SUM)]


def _lens(lab: Lab, prompt: str) -> torch.Tensor:
    model = lab.model
    with lab.trace(prompt):
        reads = [model.lm_head(model.model.norm(layer.output)) for layer in model.model.layers]
        probs = weft.save(torch.stack(reads)[:, 0, -1].softmax(-1))
    return probs


def show_lens(model: weft.LanguageModel, found: list[torch.Tensor]) -> None:
    for prompt, probs in zip((FACT, SUM), found, strict=True):
        title(f"Logit lens: {prompt!r}")
        for number, row in enumerate(probs):
            best = row.topk(3)
            words = [model.tokenizer.decode(token) for token in best.indices]
            shown = "  ".join(f"{w} {p:.2f}" for w, p in zip(words, best.values, strict=True))
            print(f"  after layer {number}:  {shown}")


class Patching(NamedTuple):
    """Logit differences: of the clean run, of the corrupted one, and patched `[layer, pos]`."""

    high: torch.Tensor
    low: torch.Tensor
    grid: torch.Tensor


def pair() -> IoiPair:
    return next(p for p in ioi_pairs(20, seed=5) if len(p.clean.split()) < 18)


def patching(lab: Lab) -> Patching:
    """Where the answer is: each activation of the clean run, put into the corrupted run."""
    model, two = lab.model, pair()
    right, wrong = (
        model.tokenizer.encode(w, add_special_tokens=False)[-1] for w in (two.answer, two.wrong)
    )

    def answer() -> torch.Tensor:
        logits = model.lm_head.output[0, -1]
        return logits[right] - logits[wrong]

    with lab.trace(two.clean):
        clean = weft.save([layer.output for layer in model.model.layers])
        high = weft.save(answer())
    with lab.trace(two.corrupt):
        low = weft.save(answer())
    grid = torch.zeros(len(clean), clean[0].shape[1])
    for number, layer in enumerate(model.model.layers):
        for position in range(clean[0].shape[1]):
            with lab.trace(two.corrupt):
                layer.output[:, position] = clean[number][:, position]
                grid[number, position] = answer()
    return Patching(high, low, grid)


def show_patching(model: weft.LanguageModel, found: Patching) -> None:
    high, low, grid = found
    two = pair()
    words = [model.tokenizer.decode(token) for token in model.tokenizer(two.clean)["input_ids"]]
    title("Activation patching")
    print(f"  clean:     {two.clean} ({two.answer})")
    print(f"  corrupted: {two.corrupt} ({two.wrong})")
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
    says = two.answer if after > 0 else two.wrong
    print(f"  patching {words[position]!r} (position {position}) after layer {layer}")
    print(f"  turns the answer from {two.wrong} ({low:+.2f}) to {says} ({after:+.2f})")


def steering(lab: Lab) -> list[torch.Tensor]:
    """Adds a direction, found on ten countries, to prompts about others: probabilities `[vocab]`,
    without and with it, country after country."""
    model = lab.model
    middle = model.model.layers[1]

    def last(prompts: list[str]) -> torch.Tensor:
        with lab.trace(prompts):
            there = middle.output[:, -1].mean(0).save()
        return there

    known, others = COUNTRIES[:10], COUNTRIES[10:14]
    direction = last([f"The language of {c.name} is" for c in known]) - last(
        [f"The capital of {c.name} is" for c in known]
    )
    found = []
    for country in others:
        for strength in (0.0, 1.0):
            with lab.trace(f"The capital of {country.name} is"):
                middle.output[:, -1] += strength * direction
                found.append(model.lm_head.output[0, -1].softmax(-1).save())
    return found


def show_steering(model: weft.LanguageModel, found: list[torch.Tensor]) -> None:
    title("Steering: from capitals to languages")
    answers = [f"{model.tokenizer.decode(p.argmax())} {float(p.max()):.2f}" for p in found]
    for country, plain, steered in zip(COUNTRIES[10:14], answers[::2], answers[1::2], strict=True):
        print(f"  {f'The capital of {country.name} is':<32} {plain:<18} steered: {steered}")


EXPERIMENTS = {
    "logit lens": lens,
    "patching, layer by position": patching,
    "steering": steering,
}
SHOWN: dict[str, Any] = {
    "logit lens": show_lens,
    "patching, layer by position": show_patching,
    "steering": show_steering,
}


# -- the same on a server -------------------------------------------------------------------------


def elsewhere(found: dict[str, Any]) -> None:
    """The same experiments on a server of this machine: its own processes, reached by HTTP."""
    title("The same experiments on a served model")
    start = time.perf_counter()
    with served(tiny_path()) as server:
        print(f"  {server.url} is ready after {time.perf_counter() - start:.1f} s")
        model = weft.LanguageModel("tiny", remote=server.url)  # a tree without weights
        print(ROW.format("", "numbers", "traces", "up", "down", *STAGES))
        for name, experiment in EXPERIMENTS.items():
            far = Lab(model)
            verdict = compared(experiment(far), found[name])
            print(ROW.format(name, verdict, len(far.traces), *travelled(far), *spent(far)))
        print("  (times in ms: the median of one trace)")
    print("  the server has ended, with all its processes")


STAGES = ("price", "queue", "run", "round trip")
ROW = "  {:<28}{:<15}{:>6}{:>10}{:>10}" + "{:>7}" * 3 + "{:>11}"


def travelled(lab: Lab) -> list[str]:
    """Bytes to the server and back, of all traces."""
    return [size(sum(getattr(t.traffic, way) for t in lab.traces)) for way in ("up", "down")]


def spent(lab: Lab) -> list[str]:
    """Milliseconds of each stage, of the trace in the middle."""
    return [f"{1e3 * median(t.stages[stage] for t in lab.traces):.1f}" for stage in STAGES]


def compared(got: Any, expected: Any) -> str:
    """How alike two results are: bitwise, or within the bound that counts as the same."""
    try:
        same.bitwise(got, expected)
    except AssertionError:
        same.bounded(got, expected)
        return "within bounds"
    return "bitwise equal"


def size(count: float) -> str:
    """`2048` as `2.0 kB`."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


# -- one experiment as data, and its time ---------------------------------------------------------


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
