"""What a process of the fleet owes to the system it runs on: a name, a parent, a quiet end.

Linux tells a process when its parent dies; elsewhere the life-line (`channel.follow`) alone does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15


def die_with(parent: int) -> None:
    """Is killed when the parent is; ends at once if that has happened already."""
    if sys.platform != "linux":
        return
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def call_me(name: str) -> None:
    """The name in `ps` and `top`; the first 15 characters count."""
    if sys.platform == "linux":
        _prctl(PR_SET_NAME, name.encode()[:15])


def _prctl(what: int, value: int | bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(what, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def ended(status: int | None) -> str:
    """How a process ended, in words; `status` as in `Popen.returncode`."""
    if status is None:
        return "ended"
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
