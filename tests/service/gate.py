"""A gateway over the store in memory, with two people who have keys, and hands that do its jobs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from weft.graph.frame import Frame
from weft.graph.node import Const, Graph, Read, Ref, Save
from weft.graph.site import Site, Where
from weft.service.gateway.app import App, make_app
from weft.service.gateway.server import Server
from weft.service.jobs.life import Finished, Job, Priced
from weft.service.store.bells import Bells
from weft.service.store.interface import Card, Key
from weft.service.store.memory import MemoryLedger, MemoryObjects
from weft.service.store.shell import Shell
from weft.settings import Settings
from weft.wire import frames
from weft.wire.messages import (
    LanguageInputs,
    LogEvent,
    Manifest,
    ModelCard,
    ModelInfo,
    OpenSession,
    PriceInfo,
    Submit,
    encode,
)
from weft.wire.results import encode_result

ANN, BOB, OLD, OPS = "weft_ann", "weft_bob", "weft_old", "weft_ops"
MODEL, PRINT = "tiny", "f" * 64
MSGPACK = {"Content-Type": "application/msgpack"}


def frame(*numbers: int) -> Frame:
    return Frame("uint8", (len(numbers),), bytes(numbers))


IDS = Frame("int64", (1, 2), (1).to_bytes(8, "little") + (2).to_bytes(8, "little"))


def submit_of(*constants: Frame, send: bool = True, **changes: Any) -> Submit:
    """A job that reads one site and has these constants."""
    digests = {f"c{number}": frames.digest(one) for number, one in enumerate(constants)}
    nodes = (
        Read(site=Site("layer", "output"), shape=(1, 2, 4), dtype="float32"),
        *(Const(key=f"c{n}", shape=c.shape, dtype=c.dtype) for n, c in enumerate(constants)),
        Save(name="h", value=Ref(0)),
    )
    sent = {frames.digest(one): one for one in constants} if send else {}
    fields: dict[str, Any] = {
        "protocol": 1,
        "request_id": "r1",
        "model": MODEL,
        "fingerprint": PRINT,
        "graph": Graph(nodes=nodes, where=(Where("mine.py", 3, "h.save()"),)),
        "inputs": LanguageInputs(given=("input_ids",)),
        "constants": digests,
        "tensors": frames.write({"input_ids": IDS, **sent}),
    }
    return Submit(**fields | changes)


def card_of(model: str = MODEL) -> Card:
    info = ModelInfo(
        id=model,
        family="language",
        class_name="Tiny",
        fingerprint=PRINT,
        dtype="float32",
        parameters=4,
    )
    data = encode(ModelCard(info=info, modules=()))
    return Card(model, "ready", PRINT, data, b"tables")


@dataclass
class House:
    """A gateway and its store."""

    settings: Settings = field(default_factory=Settings)
    models: tuple[str, ...] = (MODEL, "other")
    server: Server | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.objects = MemoryObjects()
        self.bells = Bells.of_models(self.models)
        self.ledger = MemoryLedger(self.settings, Shell(self.bells, self.objects))
        for owner, key in (("ann", ANN), ("bob", BOB), ("old", OLD)):
            self.ledger.add_key(Key(owner, hashlib.sha256(key.encode()).hexdigest(), 0.0))
        self.ledger.add_key(
            Key("ops", hashlib.sha256(OPS.encode()).hexdigest(), 0.0, scopes=("admin",))
        )
        self.ledger.revoke(hashlib.sha256(OLD.encode()).hexdigest(), 1.0)
        self.ledger.put_card(card_of())
        self.app: App = make_app(
            self.ledger,
            self.objects,
            self.bells,
            self.settings,
            models=self.models,
            version="0.1.0",
        )

    def ask(self, method: str, path: str, key: str | None = ANN, **request: Any) -> httpx.Response:
        """One request, without a socket."""
        return asyncio.run(self._ask(method, path, key, **request))

    async def _ask(self, method: str, path: str, key: str | None, **request: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        headers = dict(request.pop("headers", {}))
        if key is not None:
            headers.setdefault("Authorization", f"Bearer {key}")
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, headers=headers, **request)

    def submit(self, message: Submit, key: str | None = ANN, **headers: str) -> httpx.Response:
        content = encode(message)
        return self.ask("POST", "/api/jobs", key, content=content, headers=MSGPACK | headers)

    def job(self, key: str = ANN, **changes: Any) -> str:
        """The id of a job that was submitted."""
        reply = self.submit(submit_of(**changes), key)
        assert reply.status_code == 201, reply.text
        return reply.json()["id"]

    def session(self, key: str = ANN, **changes: Any) -> str:
        """The id of a session that was opened; the same one each time."""
        given = {"request_id": "session", "model": "tiny", "fingerprint": PRINT, **changes}
        content = encode(OpenSession(**given))
        reply = self.ask("POST", "/api/sessions", key, content=content, headers=MSGPACK)
        assert reply.status_code == 201, reply.text
        return reply.json()["id"]

    def stored(self) -> list[str]:
        """What is in the store: objects, and rows of jobs."""
        jobs = [f"job {job.id}" for owner in ("ann", "bob") for job in self.ledger.jobs(owner)]
        return self.objects.names("") + jobs

    # -- the checker's and the worker's part -----------------------------------------------------

    def price(self) -> Job:
        job = self.ledger.claim("received", self.models, "checker", 1.0, 1e12)
        assert job is not None
        info = PriceInfo(
            sites=1, operations=0, flops=0, constant_bytes=0, saved_bytes=8, peak_bytes=8
        )
        event = Priced(price=encode(info, "json"), cost=1.0, names=("h", "k"))
        return self.ledger.step(job.id, event, 2.0, job.token)

    def begin(self) -> Job:
        job = self.ledger.claim("queued", self.models, "worker", 3.0, 1e12)
        assert job is not None
        return job

    def log(self, job: Job, text: str) -> None:
        assert job.token is not None
        self.ledger.note(job.id, job.token, "log", encode(LogEvent(text=text), "json"))
        self.bells.gateway.ring()

    def finish(self, job: Job) -> bytes:
        data = result_file()
        self.objects.put(f"results/{job.id}", data)
        event = Finished(
            result_bytes=len(data), result_sha256=hashlib.sha256(data).hexdigest(), names=("h", "k")
        )
        self.ledger.step(job.id, event, 4.0, job.token)
        return data

    def do(self) -> bytes:
        """Does the oldest job; its result."""
        self.price()
        return self.finish(self.begin())


def result_file() -> bytes:
    manifest = Manifest(saved=(("h", Ref(0)), ("k", Ref(1))))
    tensors = {"0": Frame("float32", (2, 2), bytes(range(16))), "1": frame(7, 8, 9)}
    return encode_result(manifest, tensors)


@contextlib.contextmanager
def live(house: House) -> Iterator[str]:
    """The house's app on a free port of this machine, over real HTTP."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    ready = threading.Event()
    server = house.server = Server(house.app, listening, ready.set)
    thread = threading.Thread(target=server.run, name="gateway")
    thread.start()
    try:
        assert ready.wait(60)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.finish()
        thread.join(60)
        listening.close()
        assert not thread.is_alive()
        assert house.app.gateway.watch.waiting == 0


def bearer(key: str = ANN) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
