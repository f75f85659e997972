"""How much memory processes take and this machine has, as the system tells it. Linux has the
figures; elsewhere they are 0, and nothing is held to a budget.

    process_bytes(pid)                     # what would be free without that process, about
    free_bytes()                           # of this machine, or of the container that this is in
    cached_bytes(weight_files(source))     # (bytes of the files, of them in the page cache)
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Iterable
from pathlib import Path

PAGE = mmap.PAGESIZE
AT_ONCE = 1 << 30
"""Bytes of a file whose pages are looked at in one call."""
CGROUP = Path("/sys/fs/cgroup")


def process_bytes(pid: int) -> int:
    """Its proportional share of memory (PSS); where that is not told, what is resident (RSS).

    Pages that several processes share, such as those of torch, count by their share of each.
    """
    try:
        found = re.search(
            rb"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_bytes(), re.M
        )
        if found:
            return int(found[1]) << 10
    except OSError:
        pass  # it has ended, or may not be looked into
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * PAGE
    except (OSError, IndexError, ValueError):
        return 0


def free_bytes() -> int:
    """What can be had without swapping: of the machine, or of this container if that has less."""
    try:
        told = Path("/proc/meminfo").read_bytes()
    except OSError:
        return 0
    found = re.search(rb"^MemAvailable:\s+(\d+) kB", told, re.M)
    free = int(found[1]) << 10 if found else 0
    limit, used = _number(CGROUP / "memory.max"), _number(CGROUP / "memory.current")
    return free if limit is None or used is None else min(free, max(0, limit - used))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # there is none, or it says "max"
        return None


# -- files -----------------------------------------------------------------------------------------


def weight_files(source: str) -> list[Path]:
    """The files with the weights of a model: of its folder, or as the hub's cache has them."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _in_hub_cache(source)
    return sorted(folder.glob("*.safetensors"))


def _in_hub_cache(id: str) -> Path:
    """The files of the branch `main` of a model, where they were downloaded."""
    home = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    model = cache / f"models--{id.replace('/', '--')}"
    try:
        return model / "snapshots" / (model / "refs" / "main").read_text().strip()
    except OSError:
        return model / "snapshots" / "none"


def cached_bytes(files: Iterable[Path]) -> tuple[int, int]:
    """Bytes of the files, and how many of them the system holds in its page cache."""
    size = cached = 0
    for file in files:
        try:
            its, has = _cached(file)
        except (OSError, ValueError):
            continue
        size, cached = size + its, cached + has
    return size, cached


def _cached(file: Path) -> tuple[int, int]:
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        found = 0
        for start in range(0, size, AT_ONCE):
            length = min(AT_ONCE, size - start)
            with mmap.mmap(opened.fileno(), length, offset=start, access=mmap.ACCESS_COPY) as view:
                found += _resident(view, length)
    return size, min(size, found)


def _resident(view: mmap.mmap, length: int) -> int:
    """Bytes of the pages that are in memory; nothing is read for it."""
    mincore = getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)
    if mincore is None:
        return 0
    pages = (ctypes.c_ubyte * (-(-length // PAGE)))()
    start = ctypes.c_char.from_buffer(view)
    try:
        if mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(length), pages) != 0:
            return 0
    finally:
        del start  # or the view could not be closed
    return sum(page & 1 for page in bytes(pages)) * PAGE
