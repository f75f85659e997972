"""Carries out what the life of a job commands: wakes who has something to do, drops what is over,
and tells the log.

ledger = open_ledger(path, settings, carry=Shell(bells, objects))
"""

from __future__ import annotations

from weft.service.jobs.life import Command, DropSubmit, Job, Ring
from weft.service.store.bells import Bells
from weft.service.store.interface import Objects
from weft.service.store.logs import tell


class Shell:
    """What a ledger calls after each step that it has made durable."""

    def __init__(self, bells: Bells, objects: Objects) -> None:
        self._bells = bells
        self._objects = objects

    def __call__(self, job: Job, commands: tuple[Command, ...]) -> None:
        tell(job, commands)
        for command in commands:
            if isinstance(command, Ring):
                self._bells.ring(command.who, job.model)
            elif isinstance(command, DropSubmit):
                self._objects.delete(f"submits/{job.id}")
