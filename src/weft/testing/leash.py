"""`weft serve` on a leash: it ends when its input does, as whoever started it has died or let go.

python -m weft.testing.leash MODEL ...
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from weft.cli import main as weft


def main(arguments: list[str]) -> int:
    """Is `weft serve`, until it ends by itself or by SIGTERM, which the end of the input means."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    return weft(["serve", *arguments])


def _end_with_input() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
