"""Graphs that sessions have sent: the next request of a session may name one by its hash."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

from msgspec import msgpack

from weft.graph.node import Graph

GRAPH_BYTES = 64 << 20
"""Bytes of graphs that are remembered, of all sessions together."""


class Graphs:
    """The graphs of sessions, by session and hash; the longest unused go first."""

    def __init__(self, limit: int = GRAPH_BYTES) -> None:
        self._limit = limit
        self._bytes = 0
        self._lock = threading.Lock()
        self._graphs: OrderedDict[tuple[str, str], tuple[int, Graph]] = OrderedDict()

    def find(self, session: str, digest: str) -> Graph | None:
        with self._lock:
            found = self._graphs.get((session, digest))
            if found is None:
                return None
            self._graphs.move_to_end((session, digest))
            return found[1]

    def keep(self, session: str, graph: Graph) -> None:
        data = msgpack.encode(graph)
        key = session, hashlib.sha256(data).hexdigest()
        with self._lock:
            if key in self._graphs or len(data) > self._limit // 4:
                return
            self._graphs[key] = len(data), graph
            self._bytes += len(data)
            while self._bytes > self._limit:
                _, (size, _) = self._graphs.popitem(last=False)
                self._bytes -= size
