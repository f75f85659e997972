"""`Stream`: values of a block as they come to be.

with model.generate(prompt, max_new_tokens=20) as tracer:
    tracer.stream(model.lm_head.output[:, -1].argmax(-1), to=show)    # called at every step
    tracer.stream(model.lm_head.output[:, -1])                        # kept, to go through
for logits in tracer.stream:
    ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, closing
from typing import Any

from weft.client.job import AsyncJob, Job
from weft.client.values import single
from weft.errors import FailedRunError, WeftError
from weft.graph.check import MAX_LOGGED
from weft.trace.lines import user_line, where
from weft.trace.recorder import Recorder
from weft.trace.streams import record_stream


class Stream:
    """`tracer.stream`: call it in the block; after the block, go through it."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._to: list[Callable[[Any], object] | None] = []
        self._kept: deque[Any] = deque()
        self._next = 0  # the number of the next value: a job that is begun anew repeats some
        self.job: Job | AsyncJob | None = None
        """Where the values come from, if the block was only sent."""

    def __call__(self, *values: Any, to: Callable[[Any], object] | None = None) -> None:
        """Hands values out when they exist: several at once as a tuple.

        values: tensors, numbers, text, or tuples, lists and dicts of these. to: is called with
        them, in the process of the block, while it runs; without it they are kept until
        `for value in tracer.stream` asks for them, after the block. What it raises ends the run.
        """
        recorder = self._recorder
        if to is not None and not callable(to):
            raise recorder.refusal(
                f"to is something to be called with each value, not {type(to).__name__}",
                "to=print, or leave it out and go through tracer.stream after the block",
            )
        number = self._to.index(to) if to in self._to else len(self._to)
        if number == MAX_LOGGED:
            raise recorder.refusal(
                f"more than {MAX_LOGGED} functions are streamed to",
                "make the function once, before the loop",
            )
        record_stream(recorder, values, number)
        if number == len(self._to):
            self._to.append(to)

    def listen(self, number: int, stream: int, value: tuple[Any, ...]) -> None:
        """A value has come."""
        if number < self._next or not 0 <= stream < len(self._to):
            return
        self._next = number + 1
        to, one = self._to[stream], single(value)
        if to is None:
            self._kept.append(one)
        else:
            to(one)

    def __iter__(self) -> Iterator[Any]:
        """The values that were kept, each once; of a job also those that are still to come.

        Raises at its end what the run failed with.
        """
        self._check()
        if isinstance(self.job, AsyncJob):
            raise self._recorder.refusal(
                "this block was left with `async with`", "write `async for value in tracer.stream`"
            )
        yield from self._there()
        if self.job is not None:
            with closing(self.job.onward()) as coming:
                for _ in coming:
                    yield from self._there()
        self._end()

    async def __aiter__(self) -> AsyncIterator[Any]:
        """The same, of a block that was left with `async with`."""
        self._check()
        if not isinstance(self.job, AsyncJob):
            for value in self:
                yield value
            return
        for value in self._there():
            yield value
        async with aclosing(self.job.onward()) as coming:
            async for _ in coming:
                for value in self._there():
                    yield value

    def _there(self) -> Iterator[Any]:
        while self._kept:
            yield self._kept.popleft()

    def _check(self) -> None:
        if self._recorder.open:
            raise self._recorder.refusal(
                "tracer.stream was gone through inside its block, where nothing runs yet",
                "do it after the block, or have values handed to a function: to=print",
            )

    def _end(self) -> None:
        failure = self._recorder.failure
        if self.job is not None or failure is None:
            return
        why = failure.message if isinstance(failure, WeftError) else failure
        raise FailedRunError(
            f"the stream ends here, because its block did not finish: {why}",
            line=where(user_line()),
            fix="mend the cause and run the block again",
        )
