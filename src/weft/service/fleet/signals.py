"""The signals that end a server, as something that a selector sees.

    with Signals() as signals:             # from now on they interrupt nothing
        selector.register(signals, EVENT_READ)
        signals.heard()                    # how many there were

SIGTERM, SIGINT and SIGHUP, which comes when a terminal is closed; one that is ignored stays so, as
under `nohup`. Only for the main thread. At the end all is as it was before.
"""

from __future__ import annotations

import signal
import socket
from types import TracebackType


class Signals:
    """See the module's text."""

    def __enter__(self) -> Signals:
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        which = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        which = [one for one in which if signal.getsignal(one) is not signal.SIG_IGN]
        self._before = {one: signal.signal(one, lambda *_: None) for one in which}
        return self

    def fileno(self) -> int:
        return self._read.fileno()

    def heard(self) -> int:
        """How many came since the last time."""
        try:
            return sum(number in self._before for number in self._read.recv(64))
        except BlockingIOError:
            return 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._read.close()
        self._write.close()
