"""Which files a process needs to be what it is: Python, its libraries, the system's, devices.

libraries()                             # rights of `landlock` by path
linked(folder)                          # folders that the links in a folder lead to
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from .landlock import DEVICE, READ, WRITE_FILE

_SYSTEM = (
    *("/usr", "/lib", "/lib64", "/lib32", "/opt", "/nix/store", "/etc/ld.so.cache"),
    *("/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/proc", "/sys"),
)
_NETWORK = (
    *("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf"),
    *("/etc/ssl", "/etc/pki", "/etc/ca-certificates", "/run/systemd/resolve"),
)
_NUMBERS = ("/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_ACCELERATORS = ("nvidia*", "dri", "kfd", "accel*")
MOST_LINKS = 10_000


def libraries() -> dict[Path, int]:
    """What a process of Python with PyTorch reads, and the devices it computes on."""
    found = {Path(path): READ for path in _SYSTEM}
    for path in (sys.prefix, sys.base_prefix, sys.exec_prefix, *_imported_from()):
        found[Path(path)] = READ
    for path in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep):
        if path.startswith("/"):
            found[Path(path)] = READ
    found |= {Path(path): READ for path in _NUMBERS}
    found[Path("/dev/null")] = READ | WRITE_FILE
    for pattern in _ACCELERATORS:
        found |= dict.fromkeys(Path("/dev").glob(pattern), DEVICE)
    found.pop(Path("/"), None)
    return found


def network() -> dict[Path, int]:
    """What finds and trusts other machines."""
    return {Path(path): READ for path in _NETWORK}


def _imported_from() -> Iterator[str]:
    """The folders that modules come from. Not the working folder, where anything may lie."""
    here = Path.cwd().resolve()
    for path in sys.path:
        if path and Path(path).resolve() != here:
            yield path


def linked(folder: Path) -> dict[Path, int]:
    """Files that the links in a folder lead to: a snapshot of the hub is made of those."""
    found: dict[Path, int] = {}
    for above, _, files in os.walk(folder):
        for name in files:
            path = Path(above, name)
            if path.is_symlink() and len(found) < MOST_LINKS:
                found[path.resolve()] = READ
    return found
