"""`weft doctor`: what a server would need of this machine, looked at without starting one.

    for finding in examine(settings, ["./models/tiny"], None): print(finding.said, finding.fix)

With the models of a configuration, what that would do (`checkup`).

Nothing is changed but a file that is written into the data folder and removed again.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import shutil
import sqlite3
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from weft.errors import MessageError, SettingError, WeftError
from weft.service.sandbox.means import check, told
from weft.service.store.tables import MIGRATIONS
from weft.settings import Settings, data_folder
from weft.wire.messages import Health, decode

from .checkup import Finding, keys, planned
from .models import Deployment
from .places import ledger_of
from .serve import is_local, listen

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "starlette", "uvicorn", "msgspec")
ENOUGH = 1 << 30
PYTHON = (3, 11)


def examine(
    settings: Settings,
    models: Sequence[str],
    server: str | None = None,
    ask: Callable[[str], int] | None = None,
    config: Sequence[Deployment] | WeftError | None = None,
) -> list[Finding]:
    """Everything that was looked at; a look that fails is a finding as well.

    ask: of a server's address gives how many models the configured key lets one use. config: the
    models of a server's file, whose settings are among these; or why it cannot be read.
    """
    looks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("Python", _python),
        ("packages", _packages),
        ("data folder", lambda: _folder(data_folder(settings))),
        ("port", lambda: _port(settings)),
        ("sandbox", lambda: _sandbox(settings.sandbox)),
    ]
    looks += [("model", lambda path=path: _model(Path(path))) for path in models]
    if isinstance(config, WeftError):
        said, fix = config.message, config.fix or "docs/serving.md has what may stand in it"
        looks.append(("config", lambda: iter([Finding("bad", "config", said, fix)])))
    elif config is not None:
        local = is_local(settings.bind)
        looks.append(("config", lambda: planned(config, settings)))
        looks.append(("keys", lambda: iter([keys(settings, local)])))
    if server is not None:
        looks.append(("server", lambda: _server(server.rstrip("/"), ask)))
    found: list[Finding] = []
    for what, look in looks:
        try:
            found += look()
        except Exception as error:  # noqa: BLE001 - whatever it is
            said = error.message if isinstance(error, WeftError) else str(error) or repr(error)
            fix = (error.fix or "") if isinstance(error, WeftError) else ""
            found.append(Finding("bad", what, said, fix))
    return found


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    well = sys.version_info[:2] >= PYTHON
    fix = "" if well else "install 3.11 or newer"
    yield Finding("ok" if well else "bad", "Python", version, fix)


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding("ok", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            fix = 'pip install "weft[hf,serve]"'
            yield Finding("bad", name, "it is not installed", fix)


def _folder(data: Path) -> Iterator[Finding]:
    there = data
    while not there.exists():
        there = there.parent
    with tempfile.TemporaryFile(dir=there) as file:
        file.write(b"x")
    yield Finding("ok", "data folder", f"{data} can be written")
    if data.exists() and data.stat().st_mode & 0o077:
        fix = f"chmod 700 {data}"
        yield Finding("note", "data folder", "others may look into it", fix)
    free = shutil.disk_usage(there).free
    well = free >= ENOUGH
    fix = "" if well else "make room: results and uploaded constants are kept there"
    yield Finding("ok" if well else "bad", "disk", f"{free / 2**30:.1f} GiB are free", fix)
    ledger = ledger_of(data)
    if ledger.exists():
        yield _schema(ledger)


def _schema(ledger: Path) -> Finding:
    connection = sqlite3.connect(f"{ledger.as_uri()}?mode=ro", uri=True)
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (health,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    finally:
        connection.close()
    if health != "ok":
        return Finding("bad", "database", str(health), "restore the data folder from a copy")
    if version > len(MIGRATIONS):
        said = f"it is of version {version}; this Weft knows {len(MIGRATIONS)}"
        return Finding("bad", "database", said, "install the version of Weft that made it")
    if version < len(MIGRATIONS):
        said = f"it is of version {version} and will be led to {len(MIGRATIONS)}"
        return Finding("note", "database", said, "copy the data folder before the first start")
    return Finding("ok", "database", f"it is whole, of version {version}")


def _port(settings: Settings) -> Iterator[Finding]:
    try:
        with listen(settings.bind, settings.port):
            pass
    except SettingError as error:
        fix = "choose another with --port; perhaps a server runs: weft status"
        yield Finding("bad", "port", error.message, fix)
        return
    yield Finding("ok", "port", f"{settings.port} is free at {settings.bind}")


def _sandbox(mode: str) -> Iterator[Finding]:
    check(mode)
    yield Finding("ok", "sandbox", told(mode))


def _model(path: Path) -> Iterator[Finding]:
    if not path.is_dir():
        fix = "name a folder; an id on the hub is loaded when the server starts"
        yield Finding("bad", "model", f"{path} is no folder", fix)
        return
    json.loads((path / "config.json").read_bytes())
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        fix = "save it with save_pretrained(..., safe_serialization=True)"
        yield Finding("bad", "model", f"{path} has no safetensors", fix)
        return
    size = sum(file.stat().st_size for file in weights)
    yield Finding("ok", "model", f"{path}: {len(weights)} files, {size / 2**20:.0f} MiB")


def _server(url: str, ask: Callable[[str], int] | None) -> Iterator[Finding]:
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=5) as reply:
            ready, body = True, reply.read()
    except urllib.error.HTTPError as error:
        ready, body = False, error.read()
    except http.client.HTTPException:
        ready, body = False, b""
    parts = _parts(body)
    if parts is None:
        said = f"what answers at {url} is no Weft server"
        yield Finding("bad", "server", said, "look at the address and the port")
        return
    if not ready:
        said = ", ".join(f"{name}: {word}" for name, word in parts.items())
        fix = "docs/operating.md says what to do when"
        yield Finding("bad", "server", f"{url} is not ready: {said}", fix)
        return
    yield Finding("ok", "server", f"{url} is ready ({parts.get('models', '')})")
    if ask is not None:
        yield Finding("ok", "key", f"it is let in; models: {ask(url)}")


def _parts(body: bytes) -> dict[str, str] | None:
    """How the parts of a server are; None for what is not the answer of one."""
    try:
        return decode(body, Health, "json").parts
    except MessageError:
        return None
