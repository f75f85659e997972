"""A real server for a while: `weft serve` as a process of its own, with a folder of its own.

    with served(tiny_path()) as server:
        model = weft.LanguageModel(tiny_path(), remote=server.url)

The client finds the key by itself. When the block is left, also by an exception, the server is told
to end, and has ended; when this process dies without leaving it, the server ends too.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from weft.settings import state_folder

START_SECONDS = 120.0
END_SECONDS = 45.0
"""Longer than `drain_seconds`, which is how long running jobs may go on."""
LOOK = 0.1

_GREETING = re.compile(r"^Weft serves .* at (http://\S+)$", re.MULTILINE)
_LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(eq=False)
class Running:
    """A server. `process` is the one that all its others belong to, `data` its folder.

    `url` is empty until `ready()` has returned.
    """

    process: subprocess.Popen[bytes]
    data: Path
    log: Path
    environ: Mapping[str, str]
    url: str = field(default="", init=False)
    _said: str = field(default="", init=False)

    def said(self) -> str:
        """All that it has printed so far; also when its folder is gone."""
        if self.log.exists():
            self._said = self.log.read_text(errors="replace")
        return self._said

    def ready(self, seconds: float = START_SECONDS) -> None:
        """Waits until it serves. Raises RuntimeError, with what it said, if it does not."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            if self._greeted() and _healthy(self.url):
                return
            time.sleep(LOOK)
        raise RuntimeError(f"the server did not become ready:\n{self.said()[-4000:]}")

    def _greeted(self) -> bool:
        if not self.url and (found := _GREETING.search(self.said())):
            self.url = found[1]
        return bool(self.url)

    def end(self, sign: int = signal.SIGTERM, seconds: float = END_SECONDS) -> int:
        """Tells it to end, and waits until it has; its exit status. One that does not is killed."""
        if self.process.poll() is None:
            self.process.send_signal(sign)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"the server did not end:\n{self.said()[-4000:]}") from None

    def kill(self) -> None:
        """Ends it as `kill -9` does, which ends its processes too; takes away what it left."""
        self.process.kill()
        self.process.wait()
        for path in (state_folder(self.environ) / "servers").glob("*.json"):
            if _pid_in(path) == self.process.pid:
                path.unlink(missing_ok=True)


@contextmanager
def served(
    *models: str,
    options: tuple[str, ...] = (),
    data: Path | None = None,
    environ: Mapping[str, str] | None = None,
    port: int = 0,
) -> Iterator[Running]:
    """Runs `weft serve MODELS` until the block is left; on a free port, unless one is given.

    `data` outlives the block if it is given. Raises RuntimeError, with what the server said, if it
    does not become ready.
    """
    with started(*models, options=options, data=data, environ=environ, port=port) as server:
        server.ready()
        yield server


@contextmanager
def started(
    *models: str,
    options: tuple[str, ...] = (),
    data: Path | None = None,
    environ: Mapping[str, str] | None = None,
    port: int = 0,
) -> Iterator[Running]:
    """The same, without waiting for it to be ready."""
    environ = os.environ if environ is None else environ
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weft-")))
        data, log = data or folder / "data", folder / "log"
        command = [sys.executable, "-m", "weft.testing.leash", *models, "--port", str(port)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--data", str(data), *options],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=dict(environ),
                start_new_session=True,  # a terminal's Ctrl-C is for this process, which ends it
            )
        server = Running(process, data, log, environ)
        stack.callback(_close, server)
        yield server


def _close(server: Running) -> None:
    try:
        server.end()
    finally:
        assert server.process.stdin is not None
        server.process.stdin.close()
        server.said()


def _healthy(url: str) -> bool:
    try:
        with _LOCAL.open(f"{url}/health", timeout=5) as reply:
            return reply.status == 200
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _pid_in(path: Path) -> int | None:
    """Whose file it is; None for one that is not whole, or gone."""
    try:
        return json.loads(path.read_bytes()).get("pid")
    except (OSError, ValueError):
        return None
