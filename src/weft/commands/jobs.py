"""`weft jobs`: what was sent to a server, from any process and machine with the same key."""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from weft.errors import SettingError, WeftError

from .options import Commands, add_server

if TYPE_CHECKING:
    from weft.client.job import Job
    from weft.wire.messages import JobInfo

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def register(commands: Commands) -> None:
    jobs = commands.add_parser("jobs", help="your jobs on a server: list, show, fetch, cancel, ...")
    actions = jobs.add_subparsers(required=True, metavar="ACTION")
    listed = actions.add_parser("list", help="the newest first")
    listed.add_argument("--state", help="these only: queued, running, done, ...")
    listed.add_argument("--model", help="of this model only")
    listed.add_argument("--limit", type=int, default=30, help="so many at most; 30")
    show = actions.add_parser("show", help="how one is: state, place in the queue, price, error")
    follow = actions.add_parser("follow", help="what happens to one, as it happens, to its end")
    fetch = actions.add_parser("fetch", help="what one saved, as a file; goes on where it broke")
    fetch.add_argument("-o", "--output", metavar="FILE", help="where to; ID.safetensors")
    fetch.add_argument("--name", action="append", default=[], help="this save only; repeatable")
    keep = actions.add_parser("keep", help="keep one for some time after its end")
    cancel = actions.add_parser("cancel", help="leave one that waits or runs")
    delete = actions.add_parser("delete", help="remove one that is over, and its result")
    for parser, run in (
        *((listed, _list), (show, _show), (follow, _follow), (fetch, _fetch), (keep, _keep)),
        *((cancel, _cancel), (delete, _delete)),
    ):
        if parser is not listed:
            parser.add_argument("id", nargs="+" if parser in (cancel, delete) else None)
        add_server(parser)
        if parser is not delete:
            parser.add_argument("--json", action="store_true", help="as JSON, for programs")
        parser.set_defaults(run=run)
    keep.add_argument("time", help="seconds, or such as 30m, 12h, 7d")


def _job(options: argparse.Namespace, id: str | None = None) -> Job:
    from weft.client.job import Job

    return Job.get(id or options.id, options.server or True)


def _list(options: argparse.Namespace) -> None:
    from weft.client.listing import jobs
    from weft.wire.messages import JobList, encode

    found = jobs(
        options.server or True, limit=options.limit, state=options.state, model=options.model
    )
    if options.json:
        print(encode(JobList(jobs=tuple(found)), "json").decode())
    else:
        print(found if found else "there are no jobs")


def _show(options: argparse.Namespace) -> None:
    _print(_job(options).status(), options.json)


def _follow(options: argparse.Namespace) -> None:
    from weft.wire.messages import encode

    job = _job(options)
    for event in job.events():
        text = encode(event, "json").decode() if options.json else _told(event)
        if text:
            print(text, flush=True)


def _fetch(options: argparse.Namespace) -> None:
    job = _job(options)
    path = Path(options.output or f"{job.id}.safetensors")
    try:
        size = job.fetch(path, *options.name)
    except OSError as error:
        if isinstance(error, WeftError):  # a server that is away is such a one
            raise
        raise SettingError(
            f"{path} cannot be written: {error.strerror or error}", fix="name another with -o"
        ) from None
    if options.json:
        _print(job.status(), True)
        return
    from weft.client.figures import size_of

    print(f"{path}  {size_of(size)}  (weft.Job.read({str(path)!r}) opens it)")


def _keep(options: argparse.Namespace) -> None:
    _print(_job(options).keep(seconds_in(options.time)), options.json)


def _cancel(options: argparse.Namespace) -> None:
    for id in options.id:
        _print(_job(options, id).cancel(), options.json)


def _delete(options: argparse.Namespace) -> None:
    for id in options.id:
        _job(options, id).delete()


# -- words -----------------------------------------------------------------------------------------


def seconds_in(text: str) -> float:
    """`90`, `30m`, `12h`, `7d` in seconds. Raises `SettingError`."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", text)
    if found is None or not float(found[1]):
        raise SettingError(f"{text!r} is no time", fix="give seconds, or such as 30m, 12h, 7d")
    return float(found[1]) * UNITS[found[2]]


def _print(info: JobInfo, as_json: bool) -> None:
    from weft.wire.messages import encode
    from weft.wire.reports import escaped

    if as_json:
        print(encode(info, "json").decode())
        return
    rows = [(name, text) for name, text in _rows(info) if text]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {escaped(text)}")


def _rows(info: JobInfo) -> list[tuple[str, str]]:
    from weft.client.figures import ago, size_of
    from weft.client.listing import waits

    price, result = info.price, info.result
    stages = ", ".join(f"{stage} {seconds:.3g} s" for stage, seconds in info.stages.items())
    expires = "" if info.expires is None else _when(info.expires)
    return [
        ("id", info.id),
        ("state", info.state),
        ("model", info.model),
        ("sent", f"{_when(info.created)} ({ago(info.created)} ago)"),
        ("waits", "" if info.error else waits(info)),
        ("begun", f"{info.attempts} times" if info.attempts > 1 else ""),
        ("stages", stages),
        ("price", "" if price is None else f"{price.flops:,} FLOPs, {size_of(price.peak_bytes)}"),
        ("result", "" if result is None else f"{size_of(result.bytes)}: {', '.join(result.names)}"),
        ("error", "" if info.error is None else info.error.message),
        ("expires", expires),
    ]


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _told(event: object) -> str:
    """An event in a line; nothing for what is said elsewhere."""
    from weft.client.figures import size_of
    from weft.wire.messages import EndEvent, LogEvent, ProgressEvent, StateEvent
    from weft.wire.reports import escaped

    match event:
        case StateEvent(state):
            return escaped(state)
        case LogEvent(text):
            return escaped(text, keep="\n\t")
        case ProgressEvent(done, total, "load"):
            return f"loading the model: {size_of(done)} of {size_of(total)}"
        case ProgressEvent(done, total):
            return f"{done} of {total} sites"
        case EndEvent(job):
            why = "" if job.error is None else f": {job.error.message}"
            return escaped(f"{job.state}{why}")
    return ""
