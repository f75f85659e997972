"""Every knob, in one table: what it is called, what it is by default, who reads it.

A value comes, in this order, from the default, the configuration file, the environment, the
argument. The file is `weft/config.toml` in the user's XDG configuration folder:

    host = "http://127.0.0.1:8765"

    settings = load()                      # file and environment
    settings = load(port=0)                # an argument wins

An unknown name raises, wherever it stands.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from weft.errors import SettingError


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The values in force. `TEXTS` says what each is for; sizes are bytes, times seconds."""

    # The client
    host: str | None = None
    key: str | None = None
    connect_seconds: float = 5.0
    retry_seconds: float = 30.0
    progress: bool = True
    sweep_bytes: int = 0

    # The server
    merge_jobs: int = 64
    merge_tokens: int = 8192
    merge_positions: int = 65_536
    merge_wait_seconds: float = 0.005
    bind: str = "127.0.0.1"
    port: int = 8765
    data: str | None = None
    allowed_hosts: str = ""
    allowed_origins: str = ""
    lease_seconds: float = 10.0
    attempts: int = 3
    keep_seconds: float = 7 * 24 * 3600.0
    longest_keep_seconds: float = 90 * 24 * 3600.0
    drain_seconds: float = 30.0
    sandbox: str = "auto"
    models_bytes: int = 0
    models_device_bytes: int = 0
    model_roots: str = ""
    model_hub: str = ""
    metrics: str = "key"
    log_format: str = "json"

    # Limits of one request, which the server enforces and publishes
    body_bytes: int = 64 << 20
    constant_bytes: int = 4 << 30
    result_bytes: int = 4 << 30
    memory_bytes: int = 8 << 30
    flops: int = 10**15
    nodes: int = 100_000
    price_seconds: float = 20.0
    run_seconds: float = 300.0
    log_bytes: int = 1 << 20
    stream_bytes: int = 16 << 20
    new_tokens: int = 4096
    choices: int = 32
    connections: int = 1_024
    address_connections: int = 256
    queued_jobs: int = 1_000
    running_jobs: int = 0

    # Limits of one key over time (0: any amount); those above may be others for a key, too
    requests_per_minute: int = 12_000
    up_bytes_per_day: int = 0
    down_bytes_per_day: int = 0
    run_seconds_per_day: float = 0.0
    stored_bytes: int = 64 << 30
    kept_bytes: int = 64 << 30

    # Sessions
    session_bytes: int = 4 << 30
    key_session_bytes: int = 0
    all_session_bytes: int = 16 << 30
    session_seconds: float = 120.0
    sessions: int = 16

    # The weights of models, where a deployment does not say otherwise
    weights_leave: bool = True
    weights_bytes: int = 256 << 20


TEXTS: dict[str, str] = {
    "host": "the server that remote=True asks, such as http://127.0.0.1:8765",
    "key": "the key sent to it; for a server on this machine it is found by itself",
    "connect_seconds": "how long to wait for a connection",
    "retry_seconds": "how long to keep trying while a server is away",
    "progress": "show progress bars for large transfers and sweeps, on a terminal",
    "sweep_bytes": "bytes that one pass of a sweep may take; 0: a quarter of what is free",
    "merge_jobs": "jobs of different users that may share a forward; 1: none do",
    "merge_tokens": "tokens of a forward that is shared, padding included",
    "merge_positions": "positions that generations which share steps may come to in all",
    "merge_wait_seconds": "under load, how long a forward waits for more jobs to share it",
    "bind": "the address that the server listens on",
    "port": "its port; 0 takes a free one",
    "data": "the folder with its jobs, results and keys",
    "allowed_hosts": "further names in the Host header that are accepted, with commas",
    "allowed_origins": "web origins that may ask, with commas; none by default",
    "lease_seconds": "how long a worker may be silent before its job is given to another",
    "attempts": "how often a job is begun before it fails, when workers die",
    "keep_seconds": "how long a finished job and its result are kept",
    "longest_keep_seconds": "how long they are kept at most where a job asks for another time",
    "drain_seconds": "how long running jobs may go on after the server was told to stop",
    "sandbox": "walls around checker and workers: auto (what there is), require, off",
    "models_bytes": "memory of all loaded models together; 0: nine tenths of what is free",
    "models_device_bytes": "the same of the accelerator; 0: nine tenths of what it has",
    "model_roots": "folders below which models may be deployed by key, with commas",
    "model_hub": "hub ids that may be deployed by key, with commas and * for any text",
    "metrics": "who may ask for /metrics: key (scope metrics), loopback (this machine, too)",
    "log_format": "lines of the log: json, or text for people",
    "body_bytes": "bytes of one request's body, constants apart",
    "constant_bytes": "bytes of one uploaded constant",
    "result_bytes": "bytes of all that one job saves",
    "memory_bytes": "bytes that one graph may keep alive at once",
    "flops": "floating point operations of one graph, without the model's own",
    "nodes": "nodes of one graph; in a generation those of all its steps",
    "price_seconds": "seconds that pricing one graph may take",
    "run_seconds": "seconds that one job may run",
    "log_bytes": "bytes that one job may log",
    "stream_bytes": "bytes of all values that one job may stream",
    "new_tokens": "tokens that one generation may make for each row",
    "connections": "connections that are open at once, those of clients that wait included",
    "address_connections": "of them from one address, if that is another machine's; 0: any number",
    "choices": "choices of one request in OpenAI's form, `n` for each of its prompts",
    "queued_jobs": "jobs of one key that may wait at once",
    "running_jobs": "jobs of one key that may run at once, more wait; 0: any number",
    "requests_per_minute": "requests of one key in a minute; 0: any number",
    "up_bytes_per_day": "bytes that one key may send in a day (UTC); 0: any number",
    "down_bytes_per_day": "bytes that one key may fetch in a day (UTC); 0: any number",
    "run_seconds_per_day": "seconds that jobs of one key may run in a day (UTC); 0: any number",
    "stored_bytes": "bytes of constants and edits that are kept of one key; 0: any number",
    "kept_bytes": "bytes of requests, results and events that are kept of one key; 0: any number",
    "session_bytes": "bytes of the values that one session keeps on the server",
    "key_session_bytes": "of all sessions of one key on the worker of a model; 0: half of the next",
    "all_session_bytes": "bytes of the values that all sessions keep on the worker of one model",
    "session_seconds": "how long a session is kept without a sign of its client",
    "sessions": "sessions that one key may have open at once",
    "weights_leave": "whether the weights of models may leave the server",
    "weights_bytes": "where they may not: bytes that may tell of them, of one key in a day (UTC)",
}

NAMES = tuple(field.name for field in fields(Settings))
_TYPES = {field.name: str(field.type).split(" |")[0] for field in fields(Settings)}
_MOST = {"port": 65_535}
MOST = 2**63 - 1
"""No number is larger: rows and messages have place for so much."""


def variable(name: str) -> str:
    """The environment variable of a setting: `WEFT_HOST`."""
    return f"WEFT_{name.upper()}"


def load(
    environ: Mapping[str, str] | None = None,
    more: tuple[Mapping[str, Any], str] | None = None,
    **arguments: Any,
) -> Settings:
    """The settings from file, environment and arguments; an argument that is None is left out.

    `more` are values of another file, which win over those of the user's, and its name. Raises
    `SettingError` for an unknown name or a value of another type.
    """
    environ = os.environ if environ is None else environ
    found = Settings()
    found = _with(found, _file(environ), str(config_file(environ)))
    if more is not None:
        found = _with(found, *more)
    named = {n: environ[variable(n)] for n in NAMES if environ.get(variable(n), "") != ""}
    found = _with(found, {n: _parsed(n, text) for n, text in named.items()}, "the environment")
    return _with(found, {n: v for n, v in arguments.items() if v is not None}, "an argument")


def config_file(environ: Mapping[str, str] | None = None) -> Path:
    """Where the configuration file is, if there is one."""
    return _folder("XDG_CONFIG_HOME", ".config", environ) / "weft" / "config.toml"


def state_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where servers on this machine leave their keys and addresses for its own user's clients."""
    return _folder("XDG_STATE_HOME", ".local/state", environ) / "weft"


def data_folder(settings: Settings, environ: Mapping[str, str] | None = None) -> Path:
    """The server's folder with jobs, results and keys."""
    if settings.data:
        return Path(settings.data).expanduser()
    return _folder("XDG_DATA_HOME", ".local/share", environ) / "weft"


def _folder(variable: str, default: str, environ: Mapping[str, str] | None) -> Path:
    environ = os.environ if environ is None else environ
    given = environ.get(variable)
    return Path(given) if given else Path.home() / default


def _file(environ: Mapping[str, str]) -> dict[str, Any]:
    path = config_file(environ)
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SettingError(f"{path} cannot be read: {error}") from None


def _with(settings: Settings, values: Mapping[str, Any], source: str) -> Settings:
    for name, value in values.items():
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            raise SettingError(
                f"{source} has no setting {name!r}",
                fix=f"did you mean {near[0]}?" if near else f"settings are {', '.join(NAMES)}",
            )
        if not _fits(name, value):
            most = f" up to {_MOST[name]}" if name in _MOST else ""
            raise SettingError(f"{name} in {source} should be {_TYPES[name]}{most}, not {value!r}")
    return replace(settings, **values)


def _fits(name: str, value: Any) -> bool:
    kind = _TYPES[name]
    if kind in ("float", "int"):
        number = isinstance(value, (int, float) if kind == "float" else int)
        return number and not isinstance(value, bool) and 0 <= value <= _MOST.get(name, MOST)
    return isinstance(value, bool if kind == "bool" else str)


def _parsed(name: str, text: str) -> Any:
    """A value from an environment variable."""
    kind = _TYPES[name]
    try:
        if kind == "bool":
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        return int(text) if kind == "int" else float(text) if kind == "float" else text
    except (KeyError, ValueError):
        raise SettingError(f"{variable(name)} should be {kind}, not {text!r}") from None
