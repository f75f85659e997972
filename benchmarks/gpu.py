"""Weft on one GPU, beside the bare forward and beside hooks by hand.

    python -m benchmarks.gpu --write table.md               # on the first CUDA device
    python -m benchmarks.gpu --device cpu --small           # whether it runs at all

Each row is printed as soon as it is measured. The three ways take turns, with the device waited for
before and after each; times are medians. Both ways must give the same numbers before they are
measured. Models have random weights, made on the device.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import weft

LENGTH, INVOKES, NEW, POSITIONS = 64, 8, 20, 9
HEAD = "| model | work | bare, ms | hooks, ms | Weft, ms | over hooks, ms | x hooks |"
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
OPTIONS["pad_token_id"] = 0

Way = Callable[[], Any]


def configs(small: bool) -> dict[str, tuple[Any, torch.dtype]]:
    """The models by name, with what their weights are."""
    worst = GPT2Config(n_layer=12, n_embd=64, n_head=4, vocab_size=256, n_positions=1024)
    found: dict[str, tuple[Any, torch.dtype]] = {"GPT-2, 64 wide": (worst, torch.float32)}
    shapes = {"Llama, 1.1B": (2048, 5632, 22, 32, 4), "Llama, 6.7B": (4096, 11008, 32, 32, 32)}
    if small:
        shapes = {"Llama, tiny": (32, 48, 3, 4, 2)}
    for name, (width, inner, layers, heads, shared) in shapes.items():
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=shared,
            vocab_size=256 if small else 32000,
            tie_word_embeddings=False,
        )
        found[name] = config, torch.bfloat16
    return found


def build(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights, made where they stay."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


class Works:
    """The pieces of work on one model. Each is `(name, bare, hooks, Weft)`."""

    def __init__(self, net: Any) -> None:
        self.net = net
        self.model: Any = weft.LanguageModel(net)
        self.is_gpt2 = net.config.model_type == "gpt2"
        self.layers = list(self.inside(net)[0])
        self.middle = len(self.layers) // 2
        self.device = next(net.parameters()).device
        self.ids = torch.randint(1, net.config.vocab_size, (1, LENGTH), device=self.device)
        self.rows = torch.randint(1, net.config.vocab_size, (INVOKES, LENGTH), device=self.device)

    def inside(self, root: Any) -> tuple[Any, Any]:
        """The layers and the last norm, of the model or of its handle."""
        if self.is_gpt2:
            return root.transformer.h, root.transformer.ln_f
        return root.model.layers, root.model.norm

    def all(self) -> Iterator[tuple[str, Way, Way, Way]]:
        bare = self.bare
        yield "one edit, one read", bare, self.hooks_edit, self.weft_edit
        yield "save every layer", bare, self.hooks_all, self.weft_all
        yield "logit lens, every layer", bare, self.hooks_lens, self.weft_lens
        yield "gradients at every layer", bare, self.hooks_grad, self.weft_grad
        yield f"generate {NEW}, edit each step", self.bare_new, self.hooks_new, self.weft_new
        yield f"{INVOKES} invokes", self.bare_rows, self.hooks_rows, self.weft_rows

    def bare(self) -> Any:
        with torch.no_grad():
            return self.net(input_ids=self.ids, use_cache=False).logits

    def bare_rows(self) -> Any:
        with torch.no_grad():
            return self.net(input_ids=self.rows, use_cache=False).logits

    def bare_new(self) -> Any:
        with torch.no_grad():
            return self.net.generate(self.ids, **OPTIONS)

    @contextmanager
    def hooked(self, *pairs: tuple[Any, Callable]) -> Iterator[None]:
        handles = [module.register_forward_hook(hook) for module, hook in pairs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def hooks_edit(self, forward: Way | None = None) -> list[Any]:
        kept: list[Any] = []
        edit = (self.layers[self.middle], _double)
        read = (self.net.lm_head, lambda module, args, output: kept.append(output.clone()))
        with self.hooked(edit, read):
            (forward or self.bare)()
        return kept

    def weft_edit(self) -> list[Any]:
        with self.model.trace(self.ids):
            self.inside(self.model)[0][self.middle].output[:, -1] *= 2.0
            logits = self.model.lm_head.output.save()
        return [logits]

    def hooks_all(self) -> list[Any]:
        kept: list[Any] = []
        read = lambda module, args, output: kept.append(output.clone())
        with self.hooked(*[(layer, read) for layer in self.layers]):
            self.bare()
        return kept

    def weft_all(self) -> list[Any]:
        with self.model.trace(self.ids):
            kept = [layer.output.save() for layer in self.inside(self.model)[0]]
        return kept

    def hooks_lens(self) -> list[Any]:
        kept: list[Any] = []
        norm, head = self.inside(self.net)[1], self.net.lm_head
        read = lambda module, args, output: kept.append(head(norm(output[:, -1])))
        with self.hooked(*[(layer, read) for layer in self.layers]):
            self.bare()
        return kept

    def weft_lens(self) -> list[Any]:
        model = self.model
        with model.trace(self.ids):
            layers, norm = self.inside(model)
            kept = [model.lm_head(norm(layer.output[:, -1])).save() for layer in layers]
        return kept

    def hooks_grad(self) -> list[Any]:
        kept: list[Any] = []

        def read(module: Any, args: Any, output: torch.Tensor) -> None:
            if not kept:
                output.requires_grad_(True)
            kept.append(output)

        with self.hooked(*[(layer, read) for layer in self.layers]):
            logits = self.net(input_ids=self.ids, use_cache=False).logits
        return list(torch.autograd.grad(logits[:, -1].float().logsumexp(-1).sum(), kept))

    def weft_grad(self) -> list[Any]:
        model = self.model
        with model.trace(self.ids):
            sites = [layer.output for layer in self.inside(model)[0]]
            loss = model.lm_head.output[:, -1].float().logsumexp(-1).sum()
            kept = weft.save(list(torch.autograd.grad(loss, sites)))
        return list(kept)

    def hooks_new(self) -> list[Any]:
        with self.hooked((self.layers[self.middle], _double)):
            return [self.bare_new()]

    def weft_new(self) -> list[Any]:
        with self.model.generate(self.ids, **OPTIONS) as tracer:
            self.inside(self.model)[0][self.middle].output[:, -1] *= 2.0
            found = tracer.result.save()
        return [found]

    def hooks_rows(self) -> list[Any]:
        return list(self.hooks_edit(self.bare_rows)[0].split(1))

    def weft_rows(self) -> list[Any]:
        kept = []
        with self.model.trace() as tracer:
            for row in self.rows:
                with tracer.invoke(row[None]):
                    self.inside(self.model)[0][self.middle].output[:, -1] *= 2.0
                    kept.append(self.model.lm_head.output.save())
        return kept


def _double(module: Any, args: Any, output: torch.Tensor) -> None:
    output[:, -1] *= 2.0


class Patching:
    """Clean activations at each layer and position of a corrupt prompt; by hand in one batch."""

    def __init__(self, device: torch.device, small: bool) -> None:
        config = GPT2Config(n_layer=3, n_embd=32, n_head=4) if small else GPT2Config()
        self.net = build(config, torch.float32, device)
        self.model: Any = weft.LanguageModel(self.net)
        self.layers = self.net.transformer.h
        self.clean, self.corrupt = torch.randint(50257, (2, 1, POSITIONS), device=device)
        with self.model.trace(self.clean):
            self.kept = weft.save([layer.output for layer in self.model.transformer.h])

    def bare(self) -> Any:
        with torch.no_grad():
            return self.net(input_ids=self.rows(), use_cache=False).logits

    def rows(self) -> torch.Tensor:
        return self.corrupt.expand(len(self.layers) * POSITIONS, POSITIONS)

    def hooks(self) -> list[Any]:
        handles = [
            layer.register_forward_hook(self.patch(number))
            for number, layer in enumerate(self.layers)
        ]
        try:
            return [self.bare()[:, -1].clone()]
        finally:
            for handle in handles:
                handle.remove()

    def patch(self, number: int) -> Callable:
        def patch(module: Any, args: Any, output: torch.Tensor) -> None:
            for position in range(POSITIONS):
                output[number * POSITIONS + position, position] = self.kept[number][0, position]

        return patch

    def weft(self) -> list[Any]:
        model, kept = self.model, self.kept

        def point(tracer: Any, layer: int, position: int) -> Any:
            model.transformer.h[layer].output[:, position] = kept[layer][:, position]
            return model.lm_head.output[0, -1]

        grid = {"layer": range(len(self.layers)), "position": range(POSITIONS)}
        return [model.sweep(self.corrupt, point, **grid).values.flatten(0, 1)]


def same(first: list[Any], second: list[Any]) -> None:
    """Numbers alike to what the dtype rounds; tokens equal."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        if not a.is_floating_point():
            assert torch.equal(a, b)
            continue
        apart = float((a.float() - b.float()).abs().max() / a.float().abs().max())
        assert apart < (1e-4 if a.dtype == torch.float32 else 0.05), apart


def timed(way: Way, wait: Way) -> float:
    """Milliseconds, until the device is done."""
    wait()
    start = time.perf_counter()
    way()
    wait()
    return (time.perf_counter() - start) * 1e3


def row(model: str, work: tuple[str, Way, Way, Way], wait: Way, seconds: float) -> str:
    """A line of the table: at most 30 rounds, or as many as there is time for; 3 at least."""
    name, *ways = work
    same(ways[1](), ways[2]())
    for way in ways:
        way()
    times: list[list[float]] = [[], [], []]
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or (len(times[0]) < 30 and time.perf_counter() < end):
        for number, way in enumerate(ways):
            times[number].append(timed(way, wait))
    bare, hooks, ours = map(median, times)
    over = median(b - a for a, b in zip(times[1], times[2], strict=True))
    ratio = median(b / a for a, b in zip(times[1], times[2], strict=True))
    figures = f"{bare:.2f} | {hooks:.2f} | {ours:.2f} | {over:+.2f} | {ratio:.2f}"
    return f"| {model} | {name} | {figures} |"


def rows(device: torch.device, small: bool, seconds: float) -> Iterator[str]:
    """All lines. A piece of work that fails has a line that says how."""
    wait: Way = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def line(model: str, work: tuple[str, Way, Way, Way]) -> str:
        try:
            return row(model, work, wait, seconds)
        except Exception as error:  # noqa: BLE001  the others are worth having
            said = f"{type(error).__name__}: {error}".splitlines()[0].replace("|", "/")[:160]
            return f"| {model} | {work[0]} | {said} | | | | |"

    patching = Patching(device, small)
    yield line("GPT-2 small", ("sweep", patching.bare, patching.hooks, patching.weft))
    del patching
    for name, (config, dtype) in configs(small).items():
        for work in Works(build(config, dtype, device)).all():
            yield line(name, work)


def main() -> None:
    parser = argparse.ArgumentParser(description="Weft on one GPU.")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true", help="tiny models and few rounds")
    parser.add_argument("--write", type=Path, help="where the table goes")
    options = parser.parse_args()
    device = torch.device(options.device)
    which = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    lines = [f"torch {torch.__version__} on {which}; {LENGTH} tokens.", "", HEAD, "|---" * 7 + "|"]
    print("\n".join(lines), flush=True)
    for found in rows(device, options.small, 0.1 if options.small else 3.0):
        print(found, flush=True)
        lines.append(found)
        if options.write:
            options.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
