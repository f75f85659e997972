"""The environment of a process, without what is nobody's business but its starter's.

    clean(os.environ)                       # what a process of the server may be given
    scrub()                                 # in the process: says what is gone now

Tokens and passwords come in variables of all names, so what stays is a list: what libraries that
are loaded already read again, and nothing that says it is a secret.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

_STAYS = re.compile(
    r"PATH|HOME|LANG|LANGUAGE|LC_\w+|TZ|TERM|TMPDIR|USER|LOGNAME|XDG_\w+_HOME|PYTHON\w*|VIRTUAL_ENV|"
    r"LD_LIBRARY_PATH|OMP_\w+|KMP_\w+|GOMP_\w+|MKL_\w+|OPENBLAS_\w+|NUMEXPR_\w+|MALLOC_\w*|"
    r"CUDA_\w+|CUBLAS_\w+|NVIDIA_\w+|HIP_\w+|ROCR_\w+|TORCH\w*|PYTORCH\w*|TOKENIZERS_PARALLELISM|"
    r"HF_(HOME|HUB_CACHE|HUB_OFFLINE|XET_CACHE)|TRANSFORMERS_(OFFLINE|VERBOSITY)|WEFT_\w+"
)
_SECRET = re.compile(
    r"(^|_)(API)?(KEYS?|TOKENS?|SECRETS?|PASSWORDS?|PASSWD|CREDENTIALS?|AUTH)(_|$)"
)
_START, _END = 50, 51  # fields of /proc/self/stat, counted from 1


def stays(name: str) -> bool:
    """Whether a variable of this name may stay."""
    return _STAYS.fullmatch(name) is not None and _SECRET.search(name) is None


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """What of it may stay."""
    return {name: value for name, value in environ.items() if stays(name)}


def scrub() -> list[str]:
    """Takes from this process what may not stay, its first copy too, which /proc shows.

    Returns the names. What a library has copied for itself is out of reach.
    """
    gone = sorted(name for name in os.environ if not stays(name))
    for name in gone:
        del os.environ[name]
    for name, value in clean(os.environ).items():
        os.environ[name] = value  # in memory of its own from now on
    _wipe()
    return gone


def _wipe() -> None:
    """Overwrites the block in which the kernel handed the environment over."""
    if sys.platform != "linux":
        return
    # The second field, a name in brackets, may hold anything.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[_START - 3]), int(fields[_END - 3])
    if 0 < start < end:  # the kernel says 0 to who may not know
        ctypes.memset(start, 0, end - start)
