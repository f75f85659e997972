"""A block works wherever Python code runs, and knows its lines there."""

from __future__ import annotations

import asyncio
import bdb
import code
import cProfile
import doctest
import gc
import subprocess
import sys
import textwrap
import threading
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from weft.errors import LateEditError, NotSavedError, WeftError
from weft.testing.same import bitwise

from .tower import Tower, by_hand, prompt, remember

IDS = prompt()
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def logits(net: Tower) -> torch.Tensor:
    """The head's output with the first position of layer 1 zeroed, by plain hooks."""

    def zero(out: torch.Tensor) -> None:
        out[:, 0] = 0

    return by_hand(net, IDS, {"blocks.1": zero})["head"]


PROGRAM = """\
with model.trace(ids) as tracer:
    model.blocks[1].output[:, 0] = 0
    got = model.head.output.save()
"""


def lines(tracer: Any) -> list[tuple[str, int]]:
    """File and line of every line of the graph."""
    return [(where.file, where.line) for where in tracer.graph.graph.where]


# --- code that comes from text --------------------------------------------------------------------


def test_exec_of_plain_text(net: Tower, model: Any, logits: torch.Tensor) -> None:
    scope: dict[str, Any] = {"model": model, "ids": IDS}
    exec(PROGRAM, scope)
    bitwise(scope["got"], logits)
    assert lines(scope["tracer"]) == [("<string>", 2), ("<string>", 3)]


def test_a_notebook_cell(net: Tower, model: Any, logits: torch.Tensor) -> None:
    name = "<ipython-input-7-abc>"
    remember(name, PROGRAM)
    scope: dict[str, Any] = {"model": model, "ids": IDS}
    exec(compile(PROGRAM, name, "exec"), scope)
    bitwise(scope["got"], logits)
    assert lines(scope["tracer"]) == [(name, 2), (name, 3)]
    texts = [where.text for where in scope["tracer"].graph.graph.where]
    assert texts[1] == "got = model.head.output.save()"


def test_a_program_without_a_file_name(net: Tower, model: Any, logits: torch.Tensor) -> None:
    scope: dict[str, Any] = {"model": model, "ids": IDS}
    exec(compile(PROGRAM, "", "exec"), scope)
    bitwise(scope["got"], logits)
    assert lines(scope["tracer"]) == [("", 2), ("", 3)]


def test_an_interactive_console(net: Tower, model: Any, logits: torch.Tensor) -> None:
    console = code.InteractiveConsole({"model": model, "ids": IDS})
    pushed = [console.push(line) for line in [*PROGRAM.splitlines(), ""]]
    assert pushed == [True, True, True, False]
    bitwise(console.locals["got"], logits)  # type: ignore[index]
    assert lines(console.locals["tracer"]) == [("<console>", 2), ("<console>", 3)]  # type: ignore[index]


PRELUDE = """\
import torch, weft
from tests.robust.tower import prompt, tower
model, ids = weft.Model(tower()), prompt()
"""
CHECK = "\nprint('is', round(float(got.sum()), 3))\n"


def run_python(*args: str, text: str = "", folder: Path = ROOT) -> str:
    """What a fresh interpreter prints."""
    environment = {
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "OMP_NUM_THREADS": "1",
        "HOME": "/nowhere",
    }
    done = subprocess.run(
        [sys.executable, *args],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr, done.stderr
    return done.stdout


def test_the_interactive_interpreter(logits: torch.Tensor, net: Tower) -> None:
    """`python -i` with lines typed in, as a user would."""
    out = run_python("-q", "-i", text=PRELUDE + PROGRAM + "\n" + CHECK)
    assert f"is {round(float(logits.sum()), 3)}" in out


def test_under_coverage(logits: torch.Tensor, net: Tower, tmp_path: Path) -> None:
    pytest.importorskip("coverage")
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + PROGRAM + CHECK)
    out = run_python("-m", "coverage", "run", str(script), folder=tmp_path)
    assert f"is {round(float(logits.sum()), 3)}" in out
    report = run_python("-m", "coverage", "report", "--include=script.py", folder=tmp_path)
    assert "100%" in report


# --- shapes of source -----------------------------------------------------------------------------


def test_a_block_on_one_line(net: Tower, model: Any) -> None:
    # fmt: off
    with model.trace(IDS) as tracer: got = model.head.output.save()  # noqa: E701
    # fmt: on
    bitwise(got, by_hand(net, IDS, {})["head"])
    assert len(set(lines(tracer))) == 1


def test_several_statements_on_a_line(net: Tower, model: Any, logits: torch.Tensor) -> None:
    # fmt: off
    with model.trace(IDS): model.blocks[1].output[:, 0] = 0; got = model.head.output.save()  # noqa: E701, E702
    # fmt: on
    bitwise(got, logits)


def test_two_saves_on_a_line_have_names_of_their_own(net: Tower, model: Any) -> None:
    with model.trace(IDS) as tracer:
        pair = model.blocks[0].output.save(), model.blocks[1].output.save()
    assert len(tracer.results) == 2
    bitwise(list(tracer.results.values()), list(pair))


def test_a_statement_over_many_lines(net: Tower, model: Any) -> None:
    with model.trace(IDS):
        got = (
            model.blocks[0]
            .output.mul(2)
            .add(
                model.blocks[1].output,
            )
            .save()
        )
    seen = by_hand(net, IDS, {})
    bitwise(got, seen["blocks.0"] * 2 + seen["blocks.1"])


def test_several_managers_in_one_with(net: Tower, model: Any, logits: torch.Tensor) -> None:
    with torch.no_grad(), model.trace(IDS) as tracer, pytest.raises(LateEditError):
        model.blocks[1].output[:, 0] = 0
        got = model.head.output.save()
        model.blocks[0].output = model.blocks[1].output
    assert tracer.results
    bitwise(got, logits)


# --- kinds of code --------------------------------------------------------------------------------


def edit(model: Any) -> torch.Tensor:
    with model.trace(IDS):
        model.blocks[1].output[:, 0] = 0
        return model.head.output.save()


def test_nested_functions_and_helpers_keep_their_own_lines(
    net: Tower, model: Any, logits: torch.Tensor
) -> None:
    def zero(value: Any, position: int) -> None:
        value[:, position] = 0

    def body() -> Any:
        def deeper() -> Any:
            zero(model.blocks[1].output, 0)
            return model.head.output.save()

        return deeper()

    with model.trace(IDS) as tracer:
        got = body()
    bitwise(got, logits)
    first = zero.__code__.co_firstlineno + 1
    assert (__file__, first) in lines(tracer)


def test_a_class_body(net: Tower, model: Any, logits: torch.Tensor) -> None:
    class Results:
        with model.trace(IDS):
            model.blocks[1].output[:, 0] = 0
            got = model.head.output.save()

    bitwise(Results.got, logits)


def test_comprehensions_and_lambdas(net: Tower, model: Any) -> None:
    with model.trace(IDS):
        listed = [block.output.save() for block in model.blocks]
        named = {i: block.mlp.output.save() for i, block in enumerate(model.blocks)}
        mapped = list(map(lambda block: (block.output * 2).save(), model.blocks))  # noqa: C417
        summed: Any = sum(block.output for block in model.blocks)
        summed.save()
    seen = by_hand(net, IDS, {})
    blocks = [seen[f"blocks.{i}"] for i in range(3)]
    bitwise(listed, blocks)
    bitwise(list(named.values()), [seen[f"blocks.{i}.mlp"] for i in range(3)])
    bitwise(mapped, [2 * block for block in blocks])
    bitwise(summed, 0 + blocks[0] + blocks[1] + blocks[2])


def test_globals_and_nonlocals_are_assigned_in_a_block(net: Tower, model: Any) -> None:
    outer = None

    def body() -> None:
        nonlocal outer
        global _SAVED
        with model.trace(IDS):
            outer = model.blocks[0].output.save()
            _SAVED = model.head.output.save()

    body()
    seen = by_hand(net, IDS, {})
    bitwise([outer, _SAVED], [seen["blocks.0"], seen["head"]])


_SAVED: Any = None


def test_a_context_manager_of_the_users_own(net: Tower, model: Any, logits: torch.Tensor) -> None:
    from contextlib import ExitStack, contextmanager

    @contextmanager
    def zeroed() -> Iterator[Any]:
        with model.trace(IDS) as tracer:
            model.blocks[1].output[:, 0] = 0
            yield tracer

    with zeroed():
        one = model.head.output.save()
    with ExitStack() as stack:
        stack.enter_context(zeroed())
        other = model.head.output.save()
    bitwise([one, other], [logits, logits])


def test_unittest(net: Tower, model: Any, logits: torch.Tensor) -> None:
    class Case(unittest.TestCase):
        def test_edit(self) -> None:
            with self.subTest("one"):
                bitwise(edit(model), logits)
            with self.assertRaises(LateEditError), model.trace(IDS):
                model.blocks[0].output = model.blocks[1].output

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
    assert result.testsRun == 1 and result.wasSuccessful(), result.failures + result.errors


def test_a_doctest(net: Tower, model: Any, logits: torch.Tensor) -> None:
    text = """
    >>> with model.trace(ids) as tracer:
    ...     model.blocks[1].output[:, 0] = 0
    ...     got = model.head.output.save()
    >>> torch.equal(got, logits)
    True
    """
    scope = {"model": model, "ids": IDS, "torch": torch, "logits": logits}
    example = doctest.DocTestParser().get_doctest(text, scope, "example", None, 0)
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    assert runner.run(example, out=said.append, clear_globs=False).failed == 0, "".join(said)
    tracer: Any = example.globs["tracer"]
    assert [number for _, number in lines(tracer)] == [2, 3]


# --- generators, threads, tasks -------------------------------------------------------------------


def test_a_generator_with_a_block_around_its_yields(
    net: Tower, model: Any, logits: torch.Tensor
) -> None:
    got = []

    def steps() -> Iterator[None]:
        with model.trace(IDS):
            yield
            model.blocks[1].output[:, 0] = 0
            yield
            got.append(model.head.output.save())

    assert list(steps()) == [None, None]
    bitwise(got, [logits])


def test_a_generator_that_yields_results_of_its_blocks(
    net: Tower, model: Any, logits: torch.Tensor
) -> None:
    def results() -> Iterator[torch.Tensor]:
        while True:
            yield edit(model)

    one: Any = results()
    bitwise([next(one), next(one)], [logits, logits])
    one.close()


def test_a_generator_that_is_dropped_in_the_middle_closes_its_block(
    net: Tower, model: Any, logits: torch.Tensor
) -> None:
    def steps() -> Iterator[None]:
        with model.trace(IDS):
            model.head.output.save()
            yield

    one = steps()
    next(one)
    del one
    gc.collect()
    bitwise(edit(model), logits)


def test_a_generator_that_is_closed_on_another_thread_hurts_neither(
    net: Tower, model: Any, logits: torch.Tensor
) -> None:
    def steps() -> Iterator[None]:
        with model.trace(IDS):
            model.head.output.save()
            yield

    one: Any = steps()
    next(one)
    got: list[Any] = []

    def other() -> None:
        with model.trace(IDS):
            model.blocks[1].output[:, 0] = 0
            one.close()
            got.append(model.head.output.save())
        got.append(shaped(model))

    on_thread(other)
    got += [edit(model), shaped(model)]
    bitwise(got, [logits, torch.ones(2, 5, 8)] * 2)


def shaped(model: Any) -> torch.Tensor:
    """Needs the torch function mode: a factory with a value's shape."""
    with model.trace(IDS):
        return torch.ones(model.blocks[0].output.shape).save()  # type: ignore[attr-defined]


def on_thread(work: Any) -> None:
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_a_thread(net: Tower, model: Any, logits: torch.Tensor) -> None:
    got: list[torch.Tensor] = []
    on_thread(lambda: got.append(edit(model)))
    bitwise(got, [logits])


def test_a_value_of_a_block_is_refused_on_another_thread(net: Tower, model: Any) -> None:
    with model.trace(IDS):
        hidden = model.blocks[0].output
        with pytest.raises(WeftError, match="thread"):
            on_thread(lambda: hidden + 1)
        with pytest.raises(WeftError, match="no block"):
            on_thread(lambda: model.blocks[0].output)
        got = model.head.output.save()
    bitwise(got, by_hand(net, IDS, {})["head"])


def test_tasks_that_take_turns_inside_their_blocks(net: Tower, model: Any) -> None:
    """Twenty tasks on one loop, all in their blocks at once; they close in another order."""
    wanted = {}
    for number in range(20):

        def scale(out: torch.Tensor, number: int = number) -> None:
            out *= number

        wanted[number] = by_hand(net, IDS, {f"blocks.{number % 3}": scale})["head"]

    async def one(number: int) -> torch.Tensor:
        with model.trace(IDS):
            await asyncio.sleep(0)
            model.blocks[number % 3].output[:] *= number
            for _ in range((number * 7) % 5):
                await asyncio.sleep(0)
            got = model.head.output.save()
            await asyncio.sleep(0.001 * ((number * 3) % 4))
        return got

    async def main() -> list[torch.Tensor]:
        assert torch.ones(2).sum() == 2
        return await asyncio.gather(*[one(number) for number in range(20)])

    bitwise(asyncio.run(main()), list(wanted.values()))


def test_torch_of_other_tasks_is_not_recorded(net: Tower, model: Any) -> None:
    inside = asyncio.Event()

    async def blocked() -> Any:
        with model.trace(IDS) as tracer:
            got = model.head.output.save()
            inside.set()
            await asyncio.sleep(0.01)
        return tracer, got

    async def plain() -> torch.Tensor:
        await inside.wait()
        with pytest.raises(WeftError, match="no block"):
            model.head.output
        with torch.no_grad():
            return net(IDS) + torch.zeros(2, 5, 11)

    async def main() -> Any:
        task = asyncio.create_task(blocked())
        return await plain(), await task

    bare, (tracer, got) = asyncio.run(main())
    bitwise(bare, got)
    assert len(tracer.graph) == 2


def test_a_task_that_is_cancelled_in_its_block(
    net: Tower, model: Any, logits: torch.Tensor
) -> None:
    async def forever() -> None:
        with model.trace(IDS):
            model.head.output.save()
            await asyncio.sleep(100)

    async def main() -> torch.Tensor:
        task = asyncio.create_task(forever())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return edit(model)

    bitwise(asyncio.run(main()), logits)


def test_a_thread_of_a_task_starts_with_no_block(
    net: Tower, model: Any, logits: torch.Tensor
) -> None:
    """`asyncio.to_thread` copies the context, and with it the open block, to another thread."""

    async def main() -> Any:
        with model.trace(IDS):
            model.blocks[1].output[:, 0] = 0
            bare = await asyncio.to_thread(lambda: torch.zeros(3) + 1)
            with pytest.raises(WeftError, match="no block"):
                await asyncio.to_thread(lambda: model.head.output)
            other = await asyncio.to_thread(edit, model)
            got = model.head.output.save()
        return got, bare, other

    got, bare, other = asyncio.run(main())
    bitwise([got, other], [logits, logits])
    bitwise(bare, torch.ones(3))


# --- watched code ---------------------------------------------------------------------------------


def test_with_a_trace_function(net: Tower, model: Any, logits: torch.Tensor) -> None:
    seen = []

    def tracer(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code is edit.__code__:
            seen.append((event, frame.f_lineno - frame.f_code.co_firstlineno))
            return tracer
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        got = edit(model)
    finally:
        sys.settrace(before)
    bitwise(got, logits)
    assert [line for event, line in seen if event == "line"][:3] == [1, 2, 3]


def test_under_a_profiler(net: Tower, model: Any, logits: torch.Tensor) -> None:
    profile = cProfile.Profile()
    bitwise(profile.runcall(edit, model), logits)
    calls = []
    sys.setprofile(lambda frame, event, arg: calls.append(event))
    try:
        got = edit(model)
    finally:
        sys.setprofile(None)
    bitwise(got, logits)
    assert calls


def test_under_the_profiler_of_torch(net: Tower, model: Any, logits: torch.Tensor) -> None:
    profile: Any = torch.autograd.profiler.profile(use_cpu=True)
    with profile:
        got = edit(model)
    bitwise(got, logits)
    assert profile.function_events


class Stepper(bdb.Bdb):
    """Steps through a program line by line, and prints every name that it sees, as a user would."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.stops: list[int] = []
        self.shown: list[str] = []

    def user_line(self, frame: Any) -> None:
        if frame.f_code.co_filename == self.name:
            self.stops.append(frame.f_lineno)
            for name in ("hidden", "shape", "model", "tracer"):
                if name in frame.f_locals:
                    value = frame.f_locals[name]
                    self.shown += [repr(value), str(value), f"{value}"]
        self.set_step()


def test_stepping_through_a_block_in_a_debugger(net: Tower, model: Any) -> None:
    text = textwrap.dedent("""\
        with model.trace(ids) as tracer:
            hidden = model.blocks[0].output
            shape = hidden.shape
            hidden[:, 0] = 0
            got = model.head.output.save()
        after = got + 1
        """)
    runs = []
    handle = net.embed.register_forward_hook(lambda *_: runs.append(1))
    stepper = Stepper("<debugged>")
    scope: dict[str, Any] = {"model": model, "ids": IDS}
    try:
        with model.trace(IDS):
            model.head.output.save()
        runs.clear()
        stepper.run(compile(text, "<debugged>", "exec"), scope)
    finally:
        handle.remove()

    def zero(out: torch.Tensor) -> None:
        out[:, 0] = 0

    bitwise(scope["got"], by_hand(net, IDS, {"blocks.0": zero})["head"])
    assert set(stepper.stops) == {1, 2, 3, 4, 5, 6}
    assert len(runs) == 1, "printing in the debugger ran the model"
    assert any("float32[2, 5, 8]" in shown for shown in stepper.shown)
    assert not any(node.__class__.__name__ == "Guard" for node in scope["tracer"].graph.graph.nodes)


def test_pdb_with_commands(net: Tower, model: Any, logits: torch.Tensor) -> None:
    import io
    import pdb

    name = "<pdb>"
    remember(name, PROGRAM)
    said = io.StringIO()
    commands = ["n", "n", "p model.blocks[1].output", "pp ids.shape", "w", "n", "p got", "n", "c"]
    debugger = pdb.Pdb(
        stdin=io.StringIO("\n".join(commands) + "\n"), stdout=said, readrc=False, nosigint=True
    )
    debugger.use_rawinput = False
    scope: dict[str, Any] = {"model": model, "ids": IDS}
    debugger.run(compile(PROGRAM, name, "exec"), scope)
    sys.settrace(None)
    bitwise(scope["got"], logits)
    assert "float32[2, 5, 8]" in said.getvalue()


def test_printing_never_looks(net: Tower, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with model.trace(IDS) as tracer:
        hidden = model.blocks[0].output
        print(hidden, [hidden], {"h": hidden}, repr(hidden), f"{hidden}", f"{hidden!r:>10}")
        print(model.blocks[0].mix.output)
        got = model.head.output.save()
    assert len(tracer.graph) == 2
    assert capsys.readouterr().out.count("float32[2, 5, 8]") >= 7
    assert got.shape == (2, 5, 11)
    with pytest.raises(NotSavedError):
        hidden.sum()
    assert weft is not None
