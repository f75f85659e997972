"""Landlock: the kernel keeps a thread, and all that it starts from then on, to listed files.

    abi()                                   # 0: this kernel has none
    restrict({Path("/usr"): READ, data: READ | CHANGE}, network=False)

What is not listed can be neither opened nor listed, made, moved or removed; what was open stays
so. It never gets looser, needs no rights, and works inside containers. It holds for the calling
thread and for threads that it starts: call it before there are others.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

from .kernel import call, give_up_new_rights

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << n for n in range(6))
MAKE_DIR, MAKE_REG = 1 << 7, 1 << 8
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15

READ = READ_FILE | READ_DIR
"""Opening files for reading, listing folders."""
WRITE = READ_FILE | WRITE_FILE | TRUNCATE
"""Reading and changing files that are there."""
ADD = READ | MAKE_DIR | MAKE_REG | REMOVE_FILE | REFER
"""Reading, and having files appear and vanish, by a link too, but not changing one."""
DRAFT = ADD | WRITE | REMOVE_DIR
"""All of that."""
DEVICE = READ | WRITE_FILE | IOCTL_DEV

NEEDED = 2
"""Earlier versions let no file be linked into another folder, which is how results are stored."""

_FILE_RIGHTS = EXECUTE | WRITE | IOCTL_DEV
_BIND_TCP, _CONNECT_TCP = 1, 2
_ABSTRACT_SOCKETS, _SIGNALS = 1, 2
_VERSION = 1 << 0
_PATH_BENEATH = 1


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("files", ctypes.c_uint64),
        ("network", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def abi() -> int:
    """The version of Landlock that this kernel has; 0 for none."""
    try:
        return call("landlock_create_ruleset", None, 0, _VERSION)
    except OSError:
        return 0


def restrict(rules: Mapping[Path, int], *, network: bool) -> None:
    """Keeps this thread to these files and folders; `network`: it may use TCP.

    Also, where the kernel can: signals go only to those who are as restricted, and so do messages
    to sockets without a file. A path that is not there is left out. Raises OSError.
    """
    version = abi()
    handled = _handled(version)
    ruleset = _Ruleset(handled, 0, 0)
    if version >= 4 and not network:
        ruleset.network = _BIND_TCP | _CONNECT_TCP
    if version >= 6:
        ruleset.scoped = _ABSTRACT_SOCKETS | _SIGNALS
    size = 8 if version < 4 else 16 if version < 6 else 24
    fd = call("landlock_create_ruleset", ruleset, size, 0)
    try:
        for path, rights in rules.items():
            _allow(fd, path, rights & handled)
        give_up_new_rights()
        call("landlock_restrict_self", fd, 0)
    finally:
        os.close(fd)


def _handled(version: int) -> int:
    """All rights that this version can take away."""
    rights = (1 << 13) - 1
    for right, since in ((REFER, 2), (TRUNCATE, 3), (IOCTL_DEV, 5)):
        rights |= right if version >= since else 0
    return rights


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not there, or not for us: nothing to allow
    try:
        if not Path(path).is_dir():
            rights &= _FILE_RIGHTS
        call("landlock_add_rule", ruleset, _PATH_BENEATH, _Beneath(rights, fd), 0)
    finally:
        os.close(fd)
