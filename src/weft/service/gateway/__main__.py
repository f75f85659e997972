"""One gateway as a process of its own: `python -m weft.service.gateway --fd 3 --data FOLDER ...`.

Settings come from the file and the environment, as everywhere. Standard input is the life-line: a
line `drain` on it stops new jobs, its end (whoever started this is gone) stops the process.
"""

from __future__ import annotations

import argparse
import socket
import sys
import threading
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from weft.service.store.bells import Bells
from weft.service.store.folder import FolderObjects
from weft.service.store.shell import Shell
from weft.service.store.sqlite import open_ledger
from weft.settings import load

from .app import make_app
from .server import Server, log_to_stderr


def main(argv: list[str] | None = None, life: BinaryIO | FileIO | None = None) -> int:
    given = _parser().parse_args(argv)
    log_to_stderr()
    settings, data = load(), Path(given.data)
    bells = Bells.spelled_so(given.bells) if given.bells else Bells.of_models(given.model)
    objects = FolderObjects(data / "objects")
    ledger = open_ledger(data / "weft.sqlite", settings, Shell(bells, objects))
    app = make_app(
        ledger, objects, bells, settings, models=given.model, version=given.version, scratch=data
    )
    server = Server(app, socket.socket(fileno=given.fd))
    # Without a buffer: its lock would hold up the interpreter's end while the thread reads.
    line = life or FileIO(0, closefd=False)
    threading.Thread(target=obey, args=(line, server), name="life-line", daemon=True).start()
    server.run()
    ledger.close()
    return 0


def obey(line: BinaryIO | FileIO, server: Server) -> None:
    """Does what the one who started this says, until there is nobody any more."""
    for word in line:
        if word.strip() == b"drain":
            server.drain()
    server.finish()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weft.service.gateway", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="a listening socket")
    parser.add_argument("--data", required=True, help="the folder with weft.sqlite and objects/")
    parser.add_argument("--bells", help="the numbers of the bells' ends, as Bells.spelled has them")
    parser.add_argument("--model", action="append", default=[], help="the id of a model")
    parser.add_argument("--version", default="0", help="what the server says it is")
    return parser


if __name__ == "__main__":
    sys.exit(main())
