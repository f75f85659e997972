"""Jobs, events and messages for the tests of jobs and stores."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from weft.service.jobs.life import Cancel, Failed, Finished, Job, Priced, Refused, Stopped
from weft.service.store.ids import new_id
from weft.wire.messages import ErrorReport, PriceInfo, encode

_count = itertools.count(1)


def job(created: float = 100.0, **fields) -> Job:
    """A job as the gateway makes it; each has a request id of its own."""
    fields = {"owner": "ann", "request_id": f"r{next(_count)}", "model": "tiny", **fields}
    return Job(**{"id": new_id(created), "created": created, **fields})


def error(code: str = "run", message: str = "it broke") -> bytes:
    return encode(ErrorReport(code=code, message=message), "json")


PRICE = PriceInfo(
    sites=1, operations=2, flops=3, constant_bytes=4, saved_bytes=5, peak_bytes=6, ends=None
)
PRICED = Priced(price=encode(PRICE, "json"), cost=1.5, names=("h",))
REFUSED = Refused(error("graph", "not like this"))
FINISHED = Finished(result_bytes=7, result_sha256="ab" * 32, names=("h", "logits"))
FAILED = Failed(error())
CANCEL = Cancel(error("cancelled", "no more"))
STOPPED = Stopped(error("cancelled", "left it"))


def together(count: int, act: Callable[[int], object]) -> None:
    """Runs `act(0)`, `act(1)`, ... in threads that begin at once; raises what they raise."""
    ready = threading.Barrier(count)

    def run(number: int) -> None:
        ready.wait()
        act(number)

    with ThreadPoolExecutor(count) as threads:
        list(threads.map(run, range(count)))
