"""`models.ModelRows` and `kept.KeptRows` in memory: a part of `memory.MemoryLedger`."""

from __future__ import annotations

from msgspec.structs import replace

from weft.service.store.models import Deployed, WorkerMemory


class MemoryModels:
    """See the module's text. Its one lock is that of the ledger."""

    def __init__(self) -> None:
        self._memories: dict[str, WorkerMemory] = {}
        self._deployed: dict[str, Deployed] = {}

    def put_memory(self, memory: WorkerMemory) -> None:
        known = self._memories.get(memory.model)
        used = memory.used if known is None else known.used
        self._memories[memory.model] = replace(memory, used=used)

    def memory(self, model: str) -> WorkerMemory | None:
        return self._memories.get(model)

    def memories(self) -> list[WorkerMemory]:
        return [self._memories[model] for model in sorted(self._memories)]

    def use(self, model: str, now: float) -> None:
        """A job of the model began or ended."""
        known = self._memories.get(model)
        if known is not None:
            self._memories[model] = replace(known, used=max(known.used, now))

    def put_deployed(self, deployed: Deployed) -> None:
        self._deployed[deployed.id] = deployed

    def deployed(self) -> list[Deployed]:
        return [self._deployed[id] for id in sorted(self._deployed)]

    def remove_deployed(self, id: str) -> bool:
        return self._deployed.pop(id, None) is not None
