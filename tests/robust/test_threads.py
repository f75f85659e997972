"""Eight threads on one model: each gets what it would get alone.

What each graph should give is found with plain forward hooks, before, on one thread.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import weft
from tests.families import zoo
from weft.errors import FailedRunError

from .tower import LAYERS, WIDTH, Tower, by_hand, hooks, prompt, same, tower

RUNS = 200
Work = Callable[[], Any]


def at_once(works: list[Work]) -> list[Any]:
    """The results of calls that start together, each on its own thread; raises the first error."""
    start = threading.Barrier(len(works))
    results: list[Any] = [None] * len(works)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        start.wait()
        try:
            results[number] = works[number]()
        except BaseException as error:  # noqa: BLE001 (it is raised again on the main thread)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]
    return results


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can, which finds races that are rare otherwise."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


# --- graphs, and the same by hand -----------------------------------------------------------------


def reads(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    with model.trace(ids):
        layers = [block.output.save() for block in model.blocks]
        return [*layers, model.head.output.save()]


def reads_by_hand(net: Tower, ids: torch.Tensor) -> list[torch.Tensor]:
    seen = by_hand(net, ids, {})
    return [*(seen[f"blocks.{i}"] for i in range(LAYERS)), seen["head"]]


def fill(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    with model.trace(ids):
        model.blocks[1].mlp.output[:, -1] += draw(WIDTH)
        return [model.blocks[1].output.save(), model.head.output.save()]


def fill_by_hand(net: Tower, ids: torch.Tensor) -> list[torch.Tensor]:
    def add(out: torch.Tensor) -> None:
        out[:, -1] += draw(WIDTH)

    seen = by_hand(net, ids, {"blocks.1.mlp": add})
    return [seen["blocks.1"], seen["head"]]


def write(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    with model.trace(ids):
        model.blocks[0].output = draw(*ids.shape, WIDTH)
        return [model.head.output.save()]


def write_by_hand(net: Tower, ids: torch.Tensor) -> list[torch.Tensor]:
    return [by_hand(net, ids, {"blocks.0": lambda out: draw(*ids.shape, WIDTH)})["head"]]


def patch(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The second row's residual gets the first row's, from a run of its own."""
    with model.trace(ids.flip(1)):
        source = model.blocks[1].output.save()
    with model.trace(ids):
        model.blocks[1].output[1] = source[0]
        return [source, model.head.output.save()]


def patch_by_hand(net: Tower, ids: torch.Tensor) -> list[torch.Tensor]:
    source = by_hand(net, ids.flip(1), {})["blocks.1"]

    def patched(out: torch.Tensor) -> None:
        out[1] = source[0]

    return [source, by_hand(net, ids, {"blocks.1": patched})["head"]]


def lens(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    with model.trace(ids):
        return [model.head(model.norm(block.output)).save() for block in model.blocks]


@torch.no_grad()
def lens_by_hand(net: Tower, ids: torch.Tensor) -> list[torch.Tensor]:
    seen = by_hand(net, ids, {})
    return [net.head(net.norm(seen[f"blocks.{i}"])) for i in range(LAYERS)]


def steer(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    with model.trace(ids):
        for strength, block in enumerate(model.blocks):
            block.output = block.output + strength * draw(WIDTH)
        return [model.head.output.save()]


def steer_by_hand(net: Tower, ids: torch.Tensor) -> list[torch.Tensor]:
    def push(strength: int) -> Any:
        return lambda out: out + strength * draw(WIDTH)

    return [by_hand(net, ids, {f"blocks.{i}": push(i) for i in range(LAYERS)})["head"]]


def look(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    with model.trace(ids):
        if model.blocks[0].output.sum() > 1e9:
            model.blocks[1].output[:] = 0
        else:
            model.blocks[1].output[:] *= 2
        return [model.head.output.save()]


def look_by_hand(net: Tower, ids: torch.Tensor) -> list[torch.Tensor]:
    return [by_hand(net, ids, {"blocks.1": lambda out: out.mul_(2)})["head"]]


def fail(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """An index that only the run can see to be too large; then the numbers of another block."""
    with pytest.raises(IndexError, match="out of range"), model.trace(ids):
        bad = model.embed.output[:, (ids * 0 + 99)[0]].save()
        model.blocks[0].output[:] = 0
        model.head.output.save()
    with pytest.raises(FailedRunError):
        bad + 1
    with model.trace(ids):
        return [model.embed.output.save()]


def fail_by_hand(net: Tower, ids: torch.Tensor) -> list[torch.Tensor]:
    return [by_hand(net, ids, {})["embed"]]


GRAPHS = [
    (reads, reads_by_hand),
    (fill, fill_by_hand),
    (write, write_by_hand),
    (patch, patch_by_hand),
    (lens, lens_by_hand),
    (steer, steer_by_hand),
    (look, look_by_hand),
    (fail, fail_by_hand),
]
NAMES = [graph.__name__ for graph, _ in GRAPHS]


@pytest.mark.parametrize(("graph", "hand"), GRAPHS, ids=NAMES)
def test_each_graph_alone_is_right(net: Tower, model: Any, graph: Any, hand: Any) -> None:
    for length in (1, 4):
        assert same(graph(model, prompt(length)), hand(net, prompt(length)))


# --- many threads ---------------------------------------------------------------------------------


def test_eight_threads_with_other_graphs_and_lengths_get_what_they_get_alone(
    net: Tower, model: Any
) -> None:
    lengths = [2 + number for number in range(len(GRAPHS))]
    wanted = [
        [hand(net, prompt(length + turn)) for turn in range(4)]
        for (_, hand), length in zip(GRAPHS, lengths, strict=True)
    ]
    wrong: list[str] = []

    def worker(number: int) -> Work:
        graph, length = GRAPHS[number][0], lengths[number]

        def work() -> None:
            for turn in range(RUNS):
                got = graph(model, prompt(length + turn % 4))
                if not same(got, wanted[number][turn % 4]):
                    wrong.append(f"{graph.__name__}, run {turn}")

        return work

    at_once([worker(number) for number in range(len(GRAPHS))])
    assert not wrong


def test_a_bare_forward_beside_experiments_sees_none_of_them(net: Tower, model: Any) -> None:
    ids = prompt(6)
    with torch.no_grad():
        wanted = net(ids).clone()

    @torch.no_grad()
    def bare() -> int:
        return sum(not same(net(ids), wanted) for _ in range(RUNS))

    def edits() -> int:
        for _ in range(RUNS // 2):
            write(model, ids)
            steer(model, ids)
        return 0

    assert at_once([bare, edits, bare, edits]) == [0, 0, 0, 0]


def test_threads_that_wait_for_each_other_inside_their_blocks(net: Tower, model: Any) -> None:
    """All blocks are open at the same time, and close in an order of their own."""
    meet = threading.Barrier(8, timeout=60)
    wanted = [fill_by_hand(net, prompt(2 + n)) for n in range(8)]

    def worker(number: int) -> Work:
        def work() -> bool:
            ids = prompt(2 + number)
            with model.trace(ids):
                meet.wait()
                model.blocks[1].mlp.output[:, -1] += draw(WIDTH)
                meet.wait()
                got = [model.blocks[1].output.save(), model.head.output.save()]
                meet.wait()
            return same(got, wanted[number])

        return work

    assert all(at_once([worker(number) for number in range(8)]))


# --- the first use --------------------------------------------------------------------------------


@pytest.mark.usefixtures("restless")
def test_eight_threads_may_be_the_first_to_trace_a_model() -> None:
    wanted = [hand(tower(), prompt(3 + n)) for n, (_, hand) in enumerate(GRAPHS)]
    for _ in range(15):
        net = tower()
        model = weft.Model(net)
        works = [
            lambda model=model, graph=graph, n=n: graph(model, prompt(3 + n))
            for n, (graph, _) in enumerate(GRAPHS)
        ]
        assert all(map(same, at_once(works), wanted))
        assert hooks(net) == 0


@pytest.mark.usefixtures("restless")
def test_a_signature_is_learnt_while_others_run(net: Tower, model: Any) -> None:
    """Learning a new length must not disturb a pass that is under way on another thread."""
    short = prompt(3)
    wanted = reads_by_hand(net, short)
    with torch.no_grad():
        answer = net(short).clone()

    def learner(first: int) -> Work:
        return lambda: [reads(model, prompt(n)) for n in range(first, first + 40)]

    def runner() -> int:
        return sum(not same(reads(model, short), wanted) for _ in range(RUNS))

    @torch.no_grad()
    def bare() -> int:
        return sum(not same(net(short), answer) for _ in range(3 * RUNS))

    results = at_once([learner(10), learner(60), runner, runner, bare, bare])
    assert results[2:] == [0, 0, 0, 0]


def test_a_model_is_whole_at_every_line_of_ours_while_it_is_learnt(net: Tower, model: Any) -> None:
    """Between any two of our lines another thread may run the model: nothing is missing then."""

    def names() -> list[set[str]]:
        parts = [(m.__dict__, m._parameters, m._buffers, m._modules) for m in net.modules()]
        return [set(part) for group in parts for part in group]

    modules, whole, torn = list(net.modules()), names(), set()

    def is_whole() -> bool:
        try:
            return list(net.modules()) == modules and names() == whole
        except AttributeError:
            return False

    def tracer(frame: FrameType, event: str, arg: Any) -> Any:
        if "weft" not in frame.f_code.co_filename:
            return None
        if event == "line" and not is_whole():
            torn.add(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        reads(model, prompt(9))
    finally:
        sys.settrace(before)
    assert not torn


def test_weights_load_once_for_eight_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: Any = zoo.build("llama")
    saved.save_pretrained(tmp_path)
    net: Any = zoo.build("llama")
    with torch.no_grad():
        wanted = [net(torch.tensor([[5, 6, 7 + n]])).logits for n in range(8)]
    loads: list[int] = []
    from weft.handles import language

    load = language.load
    monkeypatch.setattr(language, "load", lambda *a: (loads.append(1), load(*a))[1])
    model = weft.LanguageModel(str(tmp_path))

    def worker(number: int) -> Work:
        def work() -> torch.Tensor:
            with model.trace(torch.tensor([[5, 6, 7 + number]])):
                return model.lm_head.output.save()

        return work

    got = at_once([worker(number) for number in range(8)])
    assert same(got, wanted)
    assert len(loads) == 1
    assert hooks(model.dispatch()) == 0


def test_two_models_on_two_threads_share_nothing() -> None:
    one, other = tower(), tower()
    with torch.no_grad():
        other.head.weight.mul_(2)
    ids = prompt(4)
    works: list[Work] = []
    for net in (one, other):
        model, wanted = weft.Model(net), lens_by_hand(net, ids)
        works.append(
            lambda model=model, wanted=wanted: all(
                same(lens(model, ids), wanted) for _ in range(RUNS)
            )
        )
    assert at_once(works) == [True, True]
