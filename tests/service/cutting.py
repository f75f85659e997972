"""A wire that is cut: passes bytes between a client and a server, and breaks off after some.

with cutting(url, [500, 900]) as (wire, cuts):
    ...                          # the first connection ends after 500 bytes of answer, ...
cuts()                           # how many were cut
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit


@contextlib.contextmanager
def cutting(url: str, after: list[int]) -> Iterator[tuple[str, Callable[[], int]]]:
    """The address of the wire. Each connection with more to say than the first number of `after`
    uses that one up, and is cut there; when none is left nothing is cut."""
    parts = urlsplit(url)
    target, left, cut, open_ones = (parts.hostname, parts.port), list(after), [0], []
    lock = threading.Lock()
    listening = socket.create_server(("127.0.0.1", 0))

    def carry(client: socket.socket) -> None:
        with client, socket.create_connection(target) as server:  # type: ignore[arg-type]
            open_ones.append(server)
            there = threading.Thread(target=pour, args=(client, server))
            there.start()
            count = 0
            while data := quietly(server):
                with lock:
                    limit = left[0] - count if left else len(data)
                    if left and len(data) >= limit:
                        left.pop(0)
                        cut[0] += 1
                        client.sendall(data[:limit])
                        break
                count += len(data)
                client.sendall(data)
            for end in (client, server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            there.join()

    def pour(source: socket.socket, drain: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := quietly(source):
                drain.sendall(data)
            drain.shutdown(socket.SHUT_WR)

    threads: list[threading.Thread] = []

    def accept() -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=carry, args=(client,)))
            threads[-1].start()

    threads.append(threading.Thread(target=accept))
    threads[0].start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", lambda: cut[0]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        for end in open_ones:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()


def quietly(source: socket.socket) -> bytes:
    """The next bytes; none where the connection broke."""
    try:
        return source.recv(65_536)
    except OSError:
        return b""
