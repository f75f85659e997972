"""Whether the server works, and means it: each part is looked at, the store is written to.

    GET /health/live      # this process answers
    GET /health/ready     # all parts work: send requests here; GET /health is the same

Of the models those have to be there that the server's own configuration pins. Of others, loaded on
demand or deployed by key, is told how many are well, and nothing follows from it: whoever deploys
one that cannot be loaded does not take the server away from everybody.

No key is needed, so what is found out is kept for a second, and no names are told.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time

from starlette.responses import Response

from weft.service.jobs.tally import Count
from weft.wire.messages import Health

from .accept import RETRY_SECONDS
from .bodies import answer
from .models import serves
from .state import Gateway, Visit

LOG = logging.getLogger("weft.gateway")
KEPT_SECONDS = 0.5
LEAST_FREE = 64 << 20
"""Bytes that the disk must have left."""
SILENT_SECONDS = 10.0
"""A process that was not heard of for so long, and has nothing in hand, does not work."""
OTHERS = "others"
"""The part that tells of models which are not pinned by the server's own configuration."""


def live(gateway: Gateway, visit: Visit) -> Response:
    said = Health(live=True, ready=not gateway.draining, parts={"gateway": _gateway(gateway)})
    return answer(visit.request, said)


def ready(gateway: Gateway, visit: Visit) -> Response:
    with gateway.looking:
        if time.monotonic() >= gateway.looked[0] + KEPT_SECONDS:
            gateway.looked = time.monotonic(), _parts(gateway, visit)
        parts = {"gateway": _gateway(gateway), **gateway.looked[1]}
    well = all(said == "ok" or _all_ready(said) for name, said in parts.items() if name != OTHERS)
    if gateway.sandbox is not None:
        parts["sandbox"] = gateway.sandbox
    headers = {} if well else {"Retry-After": str(RETRY_SECONDS)}
    return answer(
        visit.request, Health(live=True, ready=well, parts=parts), 200 if well else 503, headers
    )


def _all_ready(said: str) -> bool:
    """`2 of 2 ready`."""
    words = said.split()
    return len(words) == 4 and words[0] == words[2]


def _gateway(gateway: Gateway) -> str:
    return "draining" if gateway.draining else "ok"


def _parts(gateway: Gateway, visit: Visit) -> dict[str, str]:
    """How each part is doing."""
    found: dict[str, str] = {}
    for name, look in (("store", _store), ("disk", _disk)):
        try:
            found[name] = look(gateway)
        except Exception:
            LOG.exception("the %s does not work", name, extra={"request": visit.id})
            found[name] = "failing"
    try:
        found |= _processes(gateway)
    except Exception:
        LOG.exception("the store cannot be read", extra={"request": visit.id})
        found |= {"store": "failing", "models": f"0 of {len(gateway.models)} ready"}
    return found


def _store(gateway: Gateway) -> str:
    """Writes a row, as a job would."""
    gateway.ledger.add_tallies([Count("weft_health_checks_total")])
    return "ok"


def _disk(gateway: Gateway) -> str:
    """Writes a file where results are written."""
    if gateway.scratch is None:
        return "ok"
    with tempfile.TemporaryFile(dir=gateway.scratch) as file:
        file.write(b"x" * 4096)
        file.flush()
    return "ok" if shutil.disk_usage(gateway.scratch).free >= LEAST_FREE else "full"


def _processes(gateway: Gateway) -> dict[str, str]:
    now = gateway.clock()
    beats = gateway.ledger.beats()
    heard = beats.get("checker")
    pricing = gateway.settings.price_seconds + SILENT_SECONDS
    checker = "ok" if heard is None or now - heard < pricing else "silent"
    return {"checker": checker, **_models(gateway, now, beats)}


def _models(gateway: Gateway, now: float, beats: dict[str, float]) -> dict[str, str]:
    """How many of the models are well: of those that have to be there, and of the others."""
    cards = {card.model: card for card in gateway.ledger.cards()}
    well = {id for id in gateway.models if id in cards and serves(gateway, cards[id])}
    rows = {row.model: row for row in gateway.ledger.memories()}
    needed = {id for id in gateway.models if id not in rows or (rows[id].pinned and rows[id].own)}
    loaded = {id for id in well if id not in rows or rows[id].pinned}
    silent = {id for id in loaded if now - beats.get(f"worker {id}", now) >= SILENT_SECONDS}
    if silent:  # a long job is no silence: its lease is renewed meanwhile
        held = {job.model for job in gateway.ledger.unfinished() if (job.until or 0) > now}
        silent -= held
    well -= silent
    others = set(gateway.models) - needed
    told = {"models": f"{len(well & needed)} of {len(needed)} ready"}
    if others:
        told[OTHERS] = f"{len(well & others)} of {len(others)} ready"
    return told
