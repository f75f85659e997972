"""`weft status` and `weft doctor`: how a running server is, and whether a machine can run one."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .options import Commands, add_server, add_settings, settings_of


def register(commands: Commands) -> None:
    status = commands.add_parser("status", help="how a server is: models, queue, your last jobs")
    status.add_argument("--json", action="store_true", help="as JSON, for programs")
    add_server(status)
    status.set_defaults(run=_status)
    doctor = commands.add_parser(
        "doctor", help="look at this machine, a data folder and a server; says what to do"
    )
    doctor.add_argument("model", nargs="*", help="a folder with a model that is to be served")
    doctor.add_argument(
        "--config", metavar="FILE", help="the file of `weft serve --config`: what it would do here"
    )
    doctor.add_argument("--server", help="look at this server's answers, too; http://...")
    doctor.add_argument("--json", action="store_true", help="as JSON, for programs")
    add_settings(doctor, "bind", "port", "data", "sandbox")
    doctor.set_defaults(run=_doctor)


def _status(options: argparse.Namespace) -> None:
    from weft.client.catalog import models, status
    from weft.client.figures import ago
    from weft.client.listing import jobs
    from weft.wire.messages import encode
    from weft.wire.reports import escaped

    server: Any = options.server or True
    found, recent = status(server), jobs(server, limit=5)
    if options.json:
        parts = [encode(found, "json"), *[encode(job, "json") for job in recent]]
        server_, *told = [json.loads(part) for part in parts]
        print(json.dumps({"server": server_, "jobs": told}))
        return
    print(f"Weft {escaped(found.version)}, up for {found.seconds:.0f} s")
    print(models(server))
    for model in found.models:
        print(f"{escaped(model.id, keep='')}: {model.waiting} jobs wait, {model.running} run")
    for job in recent:
        print(f"job {job.id}  {escaped(job.model, keep='')}  {job.state}  {ago(job.created)} ago")


def _doctor(options: argparse.Namespace) -> int:
    from weft.client.catalog import models
    from weft.service.fleet.doctor import examine

    config, settings = _configured(options)
    found = examine(settings, options.model, options.server, lambda url: len(models(url)), config)
    if options.json:
        print(json.dumps([one._asdict() for one in found]))
    else:
        for one in found:
            print(f"{one.word:<4}  {one.what}: {one.said}", file=sys.stdout)
            if one.fix:
                print(f"      -> {one.fix}")
    return int(any(one.word == "bad" for one in found))


def _configured(options: argparse.Namespace) -> tuple[Any, Any]:
    """The models of the file that is named, if one is, or why it cannot be read; the settings."""
    from weft.errors import SettingError
    from weft.service.fleet.config import read_config

    if options.config is None:
        return None, settings_of(options)
    try:
        models, given = read_config(Path(options.config))
        return models, settings_of(options, (given, options.config))
    except SettingError as error:
        return error, settings_of(options)
