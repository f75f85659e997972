"""A thousand experiments take no more memory than ten, and nothing is left of any of them."""

from __future__ import annotations

import gc
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

import weft
from tests.leftovers import (
    ROUNDS,
    growth,
    objects,
    open_files,
    running,
    set_older_aside,
    threads_started,
)
from weft.errors import LookError, WeftError
from weft.signatures import signature

from .tower import WIDTH, Tower, hooks, prompt, tower

IDS = prompt()
PUSH = torch.ones(WIDTH)
Step = Callable[[Any], Any]
_NUMBERS = count()


# --- what is done a thousand times ----------------------------------------------------------------


def reads_and_edits(model: Any) -> None:
    with model.trace(IDS):
        hidden = model.blocks[0].output.save()
        model.blocks[1].mlp.output[:, -1] += PUSH
        model.blocks[2].output = model.blocks[1].output * 2
        weft.save([model.norm.output, model.head.output])
    assert hidden.shape == (2, 5, WIDTH)


def early_exit(model: Any) -> None:
    with model.trace(IDS) as tracer:
        model.blocks[0].output.save()
    assert tracer.ended is not None


def fresh_constants(model: Any) -> None:
    with model.trace(IDS):
        model.blocks[0].output = torch.full((2, 5, WIDTH), float(next(_NUMBERS)))
        model.head.output.save()


def written_client_tensor(model: Any) -> None:
    rows = torch.zeros(3, 2, 5, WIDTH)
    with model.trace(IDS):
        for number, block in enumerate(model.blocks):
            rows[number] = block.output


def looks(model: Any) -> None:
    with model.trace(IDS):
        if model.blocks[0].output.sum() < 1e9:
            model.head.output.save()


def fresh_lines(model: Any) -> None:
    """Every block is code of its own, as in a notebook."""
    code = "with model.trace(ids):\n    model.blocks[0].output.save()"
    exec(compile(code, f"<cell {next(_NUMBERS)}>", "exec"), {"model": model, "ids": IDS})


def block_raises(model: Any) -> None:
    with pytest.raises(ZeroDivisionError), model.trace(IDS):
        model.blocks[0].output.save()
        1 / 0


def recording_raises(model: Any) -> None:
    with pytest.raises(WeftError), model.trace(IDS):
        model.blocks[0].output = model.blocks[1].output


def node_raises(model: Any) -> None:
    with pytest.raises(IndexError), model.trace(IDS):
        kept = model.blocks[1].output.save()
        kept[:, (IDS + 99)[0]].save()


def model_raises(model: Any) -> None:
    with pytest.raises(IndexError), model.trace(IDS):
        model.embed.input[:] = 99
        model.blocks[0].output.save()


def look_refused(model: Any) -> None:
    with pytest.raises(LookError), model.scan(IDS):
        float(model.blocks[0].output.sum())


def new_thread(model: Any) -> None:
    thread = threading.Thread(target=reads_and_edits, args=(model,))
    thread.start()
    thread.join()


def kept_graph(model: Any) -> None:
    with model.trace(IDS) as tracer:
        (model.blocks[0].output * PUSH).save("h")
    tracer.graph.run(model, IDS)


STEPS: list[Step] = [
    reads_and_edits,
    early_exit,
    fresh_constants,
    written_client_tensor,
    looks,
    fresh_lines,
    block_raises,
    recording_raises,
    node_raises,
    model_raises,
    look_refused,
    new_thread,
    kept_graph,
]
NAMES = [step.__name__ for step in STEPS]


# --- how much is left -----------------------------------------------------------------------------


def tensors() -> int:
    """How many tensors are alive."""
    return objects(torch.Tensor)


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def slope(measure: Callable[[], int], step: Callable[[], Any], times: int) -> float:
    """Growth for each step, the median of all slopes between eight rests: deaf to jumps."""
    points: list[tuple[int, int]] = []
    for number in range(times + 1):
        if number % (times // 8) == 0:
            gc.collect()
            points.append((number, measure()))
        step()
    pairs = [(a, b) for i, a in enumerate(points) for b in points[i + 1 :]]
    return median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs)


def traced() -> int:
    """Bytes that Python has now."""
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("step", STEPS, ids=NAMES)
def test_python_objects_do_not_pile_up(net: Tower, model: Any, step: Step) -> None:
    for _ in range(20):
        step(model)
    slopes: list[float] = []

    def many() -> None:
        tracemalloc.start()
        try:
            slopes.append(slope(traced, lambda: step(model), 160))
        finally:
            tracemalloc.stop()

    set_older_aside()
    with threads_started() as threads:
        assert growth(tensors, many) == 0
        while min(slopes) >= 1000 and len(slopes) < ROUNDS:
            many()
    assert min(slopes) < 1000
    assert running(threads) == []
    assert hooks(net) == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_thousand_experiments_keep_the_process_as_large_as_it_was(net: Tower, model: Any) -> None:
    mixture = [reads_and_edits, fresh_constants, looks, block_raises, node_raises, model_raises]
    turns = count()

    def step() -> None:
        mixture[next(turns) % len(mixture)](model)

    for _ in range(300):
        step()
    assert slope(resident, step, 1000) < 1000


def test_large_activations_are_freed_when_the_run_ends() -> None:
    """4 MB in each layer, 200 times."""
    net = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)]).requires_grad_(False)
    model, inputs = weft.Model(net), torch.ones(16384, 64)

    def step() -> None:
        with model.trace(inputs):
            model[1].output[0] = 0
            model[2].output[:, :2].save()

    for _ in range(20):
        step()
    assert slope(resident, step, 80) < 100_000


# --- the caches -----------------------------------------------------------------------------------


class Branches(torch.nn.Module):
    """Reads its input's numbers, so that each prompt has a signature of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(1000, 4)
        self.head = torch.nn.Linear(4, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids)) * int(ids.sum())


@pytest.mark.parametrize(
    ("made", "prompts"),
    [(tower, [prompt(n) for n in range(1, 40)]), (Branches, [IDS + n for n in range(39)])],
    ids=["lengths", "numbers"],
)
def test_ever_new_prompts_fill_bounded_caches(
    made: Any, prompts: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signature, "REMEMBERED", 8)
    model = weft.Model(made())
    set_older_aside()
    for ids in prompts:
        with model.trace(ids):
            model.head.output.save()
    assert 1 <= objects(signature.Signature) <= 9


def test_the_tensors_that_stand_for_layouts_are_few_for_each_length(net: Tower, model: Any) -> None:
    """Abstract tensors are kept for each layout, and have no numbers."""
    reads_and_edits(model)
    set_older_aside()
    for length in range(50, 90):
        with model.trace(prompt(length)):
            model.blocks[0].output.save()
            model.head.output.save()
    assert tensors() <= 40 * 8


# --- what is kept by what the user keeps ----------------------------------------------------------


def test_saved_tensors_die_with_the_last_name_of_theirs(net: Tower, model: Any) -> None:
    with model.trace(IDS):
        hidden = model.blocks[0].output.save()
        pair = weft.save([model.blocks[1].output, model.head.output])
    dead = [weakref.ref(one) for one in (hidden, *pair)]
    assert all(ref() is not None for ref in dead)
    del hidden, pair
    gc.collect()
    assert all(ref() is None for ref in dead)


@pytest.mark.parametrize("step", [node_raises, model_raises, block_raises])
def test_an_error_that_was_handled_keeps_nothing_alive(net: Tower, model: Any, step: Step) -> None:
    step(model)
    set_older_aside()
    assert growth(tensors, lambda: step(model)) == 0


class Spy(torch.nn.Module):
    """Remembers, weakly, the memory of what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is not torch.Tensor or x.is_meta:
            return x * 2
        memory = (x * 2).numpy().copy()
        self.seen.append(weakref.ref(memory))
        return torch.from_numpy(memory)


def alive(model: Any) -> list[int]:
    """How many outputs of each module are in memory still."""
    gc.collect()
    spies: Any = model.dispatch()
    return [sum(ref() is not None for ref in spy.seen) for spy in spies]


LARGE = torch.ones(8, 3000)  # what is smaller is copied where it is read


@pytest.fixture
def spied() -> Any:
    return weft.Model(torch.nn.Sequential(Spy(), Spy(), Spy()))


def test_a_tracer_that_is_kept_keeps_only_what_was_saved(spied: Any) -> None:
    with spied.trace(LARGE) as tracer:
        doubled = spied[0].output * 2
        doubled.sum().save()
        kept = spied[1].output.save()
        spied[2].output + 1
    assert alive(spied) == [0, 1, 0]
    del kept
    assert tracer.results
    assert sum(alive(spied)) <= 1  # by tracer.results
    del tracer
    assert alive(spied) == [0, 0, 0]


def test_a_tracer_of_a_look_keeps_nothing_of_the_pass_before(spied: Any) -> None:
    with spied.trace(LARGE) as tracer:
        assert spied[1].output.sum() > 0
        last = spied[2].output.save()
    assert alive(spied) == [0, 0, 1]
    assert tracer.results and last.shape == LARGE.shape


def test_what_a_failed_run_had_saved_dies_with_its_error(spied: Any) -> None:
    """Not even the tracer, the handles and the graph together keep an activation."""
    bad = torch.tensor([7])
    with pytest.raises(IndexError), spied.trace(torch.ones(2, 3)) as tracer:
        first = spied[0].output.save()
        far = spied[1].output[:, bad + 0 * first[0, :1].long()].save()
    assert alive(spied) == [0, 0, 0]
    assert tracer.graph and first is not None and far is not None


def test_a_block_that_failed_keeps_nothing_of_its_own_frame(spied: Any) -> None:
    def fails() -> tuple[Any, weakref.ref]:
        large = torch.ones(1000)
        with pytest.raises(ZeroDivisionError), spied.trace(torch.ones(2, 3)) as tracer:
            spied[0].output.save()
            1 / 0
        return tracer, weakref.ref(large)

    tracer, large = fails()
    gc.collect()
    assert tracer is not None and large() is None


def test_a_model_that_raises_leaves_no_activation(spied: Any) -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if type(x) is torch.Tensor:
                raise RuntimeError("broken")
            return x

    spy = Spy()
    net = torch.nn.Sequential(spy, Broken())
    model = weft.Model(net)
    with pytest.raises(RuntimeError, match="broken"), model.trace(torch.ones(2, 3)) as tracer:
        kept = model[0].output.save()
        model[1].output.save()
    gc.collect()
    assert [ref() for ref in spy.seen] == [None]
    assert tracer is not None and kept is not None


def test_an_early_exit_leaves_no_activation(spied: Any) -> None:
    with spied.trace(torch.ones(2, 3)) as tracer:
        total = spied[1].output.sum().save()
    assert tracer.ended is not None
    assert alive(spied) == [0, 0, 0] and total == 24


def test_handles_that_were_not_saved_keep_the_recording_but_no_numbers(spied: Any) -> None:
    handles = []
    with spied.trace(torch.ones(2, 3)):
        handles.append(spied[0].output)
        handles.append(handles[0] * 2)
        spied[2].output.sum().save()
    assert alive(spied) == [0, 0, 0]


def test_inputs_and_constants_die_with_the_tracer(spied: Any) -> None:
    constant, inputs = torch.ones(3), torch.ones(2, 3)
    dead = [weakref.ref(constant), weakref.ref(inputs)]
    with spied.trace(inputs) as tracer:
        (spied[0].output + constant).sum().save()
    del constant, inputs, tracer
    gc.collect()
    assert [ref() for ref in dead] == [None, None]


def test_a_model_can_be_freed() -> None:
    net = tower()
    model = weft.Model(net)
    reads_and_edits(model)
    dead = [weakref.ref(net), weakref.ref(net.head), weakref.ref(model)]
    del net, model
    gc.collect()
    assert [ref() for ref in dead] == [None, None, None]


def test_no_file_is_left_in_the_temporary_folder(
    net: Tower, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_of_them() -> None:
        for step in STEPS:
            step(model)

    all_of_them()  # torch makes a folder of its own when it is asked the first time
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert growth(open_files, all_of_them) == 0
    assert list(tmp_path.iterdir()) == []
