"""The hands of the fleet: processes made, heard, logged and ended. Decides nothing.

    hands = Hands(selector, on_message=..., on_gone=..., write=print)
    hands.make(spec, extra_fds)            # a process, its channel and its log
    hands.tell(name, DoFinish())
    hands.kill(name)

The owner runs the selector's loop and calls the data of whatever is ready.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from selectors import EVENT_READ, BaseSelector

import msgspec

from weft.service.sandbox.environment import clean
from weft.service.store.bells import Bells
from weft.settings import variable

from .channel import Channel, Message
from .process import ended
from .spec import KIND, DoKill, DoMake, Exited, Forked, Spec, send

PATIENCE = 5.0
"""Seconds that a process may take to be gone after its channel is."""


class Made:
    """One process. `popen` is None for a child of the nursery, `born` whether it has been heard."""

    def __init__(self, spec: Spec, channel: Channel, popen: subprocess.Popen | None) -> None:
        self.spec = spec
        self.channel = channel
        self.popen = popen
        self.pid = None if popen is None else popen.pid
        self.born = False


class Hands:
    """See the module's text."""

    def __init__(
        self,
        selector: BaseSelector,
        bells: Bells,
        *,
        on_message: Callable[[str, Message], None],
        on_gone: Callable[[str], None],
        write: Callable[[str], None],
    ) -> None:
        self._selector = selector
        self._bells = bells
        self._on_message = on_message
        self._on_gone = on_gone
        self._write = write
        self._made: dict[str, Made] = {}
        self._nursery: tuple[socket.socket, subprocess.Popen] | None = None

    # -- making ----------------------------------------------------------------------------------

    def make(self, spec: Spec, extra: tuple[int, ...] = ()) -> None:
        """Starts the process that `spec` describes."""
        ours, theirs = Channel.pair()
        read, log = os.pipe()
        fds = [theirs.fileno(), log, *self._bells.fds(), *extra]
        try:
            popen = self._born(spec, fds)
        finally:
            theirs.close()
            os.close(log)
        made = self._made[spec.name] = Made(spec, ours, popen)
        self._selector.register(ours, EVENT_READ, lambda: self._hear(made))
        self._follow_log(read, spec.name)

    def _born(self, spec: Spec, fds: list[int]) -> subprocess.Popen | None:
        if spec.role == "gateway":
            return self._alone("gate", spec, fds)
        if not _from_nursery(spec):
            return self._alone("nursery", spec, fds, "--one")
        try:
            send(self._nursery_socket(), DoMake(spec), fds)
        except (BrokenPipeError, ConnectionResetError):
            self._end_nursery()  # it has died, and its end was not heard yet
            send(self._nursery_socket(), DoMake(spec), fds)
        return None

    def _alone(self, module: str, spec: Spec, fds: list[int], *more: str) -> subprocess.Popen:
        """A process of its own, which gets its order as the nursery does."""
        control, its = socket.socketpair(type=KIND)
        with control, its:
            popen = _python(module, its, None, *more)
            send(control, DoMake(spec), fds)
        return popen

    def _nursery_socket(self) -> socket.socket:
        if self._nursery is None:
            read, log = os.pipe()
            control, its = socket.socketpair(type=KIND)
            with its:
                self._nursery = control, _python("nursery", its, log)
            os.close(log)
            self._selector.register(control, EVENT_READ, self._hear_nursery)
            self._follow_log(read, "nursery")
        return self._nursery[0]

    # -- hearing ---------------------------------------------------------------------------------

    def _hear(self, made: Made) -> None:
        messages = made.channel.read()
        made.born |= bool(messages)
        for message in messages or ():
            self._on_message(made.spec.name, message)
        if messages is None:
            self._selector.unregister(made.channel)
            made.channel.close()
            if self._made.get(made.spec.name) is made:
                del self._made[made.spec.name]
            if made.popen is not None:
                self._report(made.spec.name, _reaped(made.popen))
            self._on_gone(made.spec.name)

    def _hear_nursery(self) -> None:
        assert self._nursery is not None
        try:
            data = self._nursery[0].recv(65_536)
        except ConnectionResetError:
            data = b""
        if not data:
            self._end_nursery()
            return
        said = msgspec.json.decode(data, type=Exited | Forked)
        if isinstance(said, Exited):
            self._report(said.name, said.status)
            return
        for made in self._made.values():
            if made.spec.holder == said.name:
                made.pid = said.pid

    def _end_nursery(self) -> None:
        if self._nursery is None:
            return
        (control, popen), self._nursery = self._nursery, None
        self._selector.unregister(control)
        control.close()
        self._report("nursery", _reaped(popen))

    def _report(self, name: str, status: int | None) -> None:
        if status:
            self._write(f"[{name}] {ended(status)}")

    def _follow_log(self, fd: int, name: str) -> None:
        os.set_blocking(fd, False)
        log = _Log(fd, name, self._write)

        def read() -> None:
            if not log.read():
                self._selector.unregister(fd)
                os.close(fd)

        self._selector.register(fd, EVENT_READ, read)

    # -- telling ---------------------------------------------------------------------------------

    def tell(self, name: str, message: Message, files: Sequence[int] = ()) -> None:
        if name in self._made:
            self._made[name].channel.send(message, files)

    def pids(self, names: Iterable[str]) -> dict[str, int]:
        """The process ids of those that are there, as far as they are known by now."""
        made = {name: self._made[name].pid for name in names if name in self._made}
        return {name: pid for name, pid in made.items() if pid is not None}

    def kill(self, name: str) -> None:
        made = self._made.get(name)
        if made is None:
            return
        if made.popen is not None:
            made.popen.kill()
        elif self._nursery is not None:
            self._kill_child(made, *self._nursery)

    def _kill_child(self, made: Made, control: socket.socket, nursery: subprocess.Popen) -> None:
        if not any(one.born for one in self._made.values() if one.popen is None):
            nursery.kill()  # it is still loading, would hear nothing meanwhile, and has no children
            return
        try:
            send(control, DoKill(made.spec.holder))
        except (BrokenPipeError, ConnectionResetError):
            return  # its children have died with it

    def close(self) -> None:
        """Ends whatever is there still. What was written to logs is shown."""
        for name in list(self._made):
            self.kill(name)
        self._end_nursery()
        for made in list(self._made.values()):
            self._selector.unregister(made.channel)
            made.channel.close()
            if made.popen is not None:
                _reaped(made.popen)
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, int):
                key.data()
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, int):
                self._selector.unregister(key.fileobj)
                os.close(key.fileobj)


class _Log:
    """The output of a process, line by line, each with its name in front."""

    def __init__(self, fd: int, name: str, write: Callable[[str], None]) -> None:
        self._fd = fd
        self._name = name
        self._write = write
        self._rest = b""

    def read(self) -> bool:
        """False at the end."""
        try:
            data = os.read(self._fd, 65_536)
        except BlockingIOError:
            return True
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data and self._rest:
            lines, self._rest = [self._rest], b""
        for line in lines:
            told = line.decode(errors="replace")
            self._write(told if told.startswith('{"time"') else f"[{self._name}] {told}")
        return bool(data)


def _from_nursery(spec: Spec) -> bool:
    """Whether a fork will do: not where the model goes to a GPU."""
    if sys.platform != "linux":
        return False
    device = next((model.device for model in spec.models if model.id == spec.model), None)
    return device in (None, "cpu")


def _python(
    module: str, control: socket.socket, log: int | None, *more: str
) -> subprocess.Popen[bytes]:
    """One of our programs, in a session of its own: a terminal's Ctrl-C is for the fleet only."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            f"weft.service.fleet.{module}",
            str(control.fileno()),
            str(os.getpid()),
            *more,
        ],
        env=_environ(module),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=[control.fileno()],
        start_new_session=True,
    )


def _environ(module: str) -> dict[str, str]:
    """What a process is started with: only who loads models may need the hub's token for a while.

    A library that starts threads when it is imported would have them before there are walls.
    """
    own = {name: value for name, value in os.environ.items() if name != variable("key")}
    if module == "gate":
        return clean(own)
    return {"OPENBLAS_NUM_THREADS": "1", **own}


def _reaped(popen: subprocess.Popen) -> int:
    try:
        return popen.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        popen.kill()
        return popen.wait()
