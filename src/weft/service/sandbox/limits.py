"""What a process may take at most, by limits that the kernel holds it to: it cannot raise them.

    bound(files=512, file_bytes=1 << 36, memory=True)

The size of a process is bounded by its data (`RLIMIT_DATA`: private memory that can be written),
not by its addresses, of which drivers and allocators reserve far more than they use. There is no
bound on its number of processes: the kernel counts those of the user, everywhere; see `seccomp`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def bound(*, files: int, file_bytes: int, memory: bool) -> list[str]:
    """Sets limits, hard and soft; what was lower stays. Returns what is bounded, in words.

    files: files open at once, beside those open now. file_bytes: the length of one file. memory:
    not more than the machine has, so that it is an allocation that fails here, with an error, and
    not another process that the kernel ends.
    """
    if sys.platform == "win32":
        return []
    import resource

    wanted = {"core": 0, "nofile": _open_files() + files, "fsize": file_bytes}
    present, most = data_bytes(), machine_bytes()
    if memory and present is not None and most is not None:
        wanted["data"] = max(most, present + (1 << 30))
    for name, value in wanted.items():
        _set(getattr(resource, f"RLIMIT_{name.upper()}"), value)
    return [_WORDS[name] for name in wanted]


_WORDS = {"core": "no core", "nofile": "open files", "fsize": "size of files", "data": "memory"}


def _set(which: int, value: int) -> None:
    import resource

    soft, hard = resource.getrlimit(which)
    lower = [one for one in (value, hard) if one != resource.RLIM_INFINITY]
    least = min(lower)
    kept = least if soft == resource.RLIM_INFINITY else min(soft, least)
    resource.setrlimit(which, (kept if which != resource.RLIMIT_NOFILE else least, least))


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    except OSError:
        return 64


def data_bytes() -> int | None:
    """Bytes that count against the bound now. None where nobody says."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) << 10
    return None


def machine_bytes() -> int | None:
    """Bytes of memory of this machine. None where nobody says."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
