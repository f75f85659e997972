"""Where checkers and workers come from: a process that has torch and transformers loaded already
and forks one whenever the fleet asks for it, in milliseconds instead of seconds.

It runs no operation of torch itself (it would have threads then, which a fork does not copy), has
no connection to the store and nothing to lose: when it dies its children die too, and the fleet
starts another. Where there is no fork, or a model goes to a GPU (whose driver does not survive
one), the same program becomes the one process it was asked for:

    python -m weft.service.fleet.nursery FD PARENT [--one]
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
from selectors import EVENT_READ, DefaultSelector

import msgspec

from weft.errors import WeftError
from weft.families.loading import Source, load_config, load_options, load_tokenizer, skeleton

from . import child
from .channel import IsBorn
from .models import Deployment
from .process import call_me, die_with
from .spec import DoMake, Exited, Forked, Given, Spec, alone, receive

LOG = logging.getLogger("weft.fleet")


def main(argv: list[str]) -> int:
    """Serves the fleet until it is gone."""
    die_with(int(argv[1]))
    if "--one" in argv[2:]:
        return become(*alone(argv))
    control = socket.socket(fileno=int(argv[0]))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    call_me("weft:nursery")
    return Nursery(control).serve()


def become(spec: Spec, given: Given) -> int:
    """This process is the one that is wanted, from now on."""
    status = child.run(spec, given)
    sys.stdout.flush()
    sys.stderr.flush()
    return status


class Nursery:
    """Forks children, and says when they have ended."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, str] = {}
        self._preloaded = False
        self._heard, self._called = socket.socketpair()
        for end in (self._heard, self._called):
            end.setblocking(False)
        signal.set_wakeup_fd(self._called.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def serve(self) -> int:
        with DefaultSelector() as selector:
            selector.register(self._control, EVENT_READ, self._obey)
            selector.register(self._heard, EVENT_READ, self._reap)
            going = True
            while going:
                for key, _ in selector.select():
                    going = key.data() and going
        return 0

    def _obey(self) -> bool:
        order, fds = receive(self._control)
        if order is None:
            return False
        if isinstance(order, DoMake):
            self._make(order.spec, fds)
            return True
        for pid, name in self._children.items():
            if name == order.name:
                os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        return True

    def _make(self, spec: Spec, fds: list[int]) -> None:
        if not self._preloaded:
            preload(spec.models)
            self._preloaded = True
        parent = os.getpid()
        try:
            pid = os.fork()
            if pid == 0:
                self._be_born(spec, fds, parent)
            self._children[pid] = spec.holder
        except OSError:
            # No memory for one more is no reason to take the others along. The fleet sees the end
            # of the channel, and tries again.
            LOG.exception("%s cannot be forked", spec.name)
        finally:
            for fd in fds:
                os.close(fd)

    def _be_born(self, spec: Spec, fds: list[int], parent: int) -> None:
        """In the child: nothing of the nursery is left, and nothing of it is ever returned to."""
        status = 1
        try:
            die_with(parent)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # said here, so that it is there before anything that the child says on its own line
            self._control.send(msgspec.json.encode(Forked(spec.holder, os.getpid())))
            for end in (self._control, self._heard, self._called):
                end.close()
            given = Given(spec, fds)
            given.take_over(spec.role)
            given.channel.send(IsBorn())
            status = become(spec, given)
        except Exception:
            LOG.exception("%s could not go on", spec.name)
        finally:
            os._exit(status)

    def _reap(self) -> bool:
        self._heard.recv(4096)
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            name = self._children.pop(pid)
            said = Exited(name, os.waitstatus_to_exitcode(status))
            self._control.send(msgspec.json.encode(said))
        return True


def preload(models: tuple[Deployment, ...]) -> None:
    """Imports what the children will need: the code of each model, by building its tree."""
    for model in models:
        source, options = Source.of(model.source), load_options(**model.tree_options())
        try:
            load_config(source, options)
            skeleton(source, options)
            load_tokenizer(source, None, options)
        except WeftError as error:
            LOG.info("%s: nothing loaded ahead: %s", model.id, error.message)
    gc.collect()
    gc.freeze()  # children share these pages as long as nobody walks over them


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
