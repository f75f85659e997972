"""Which walls this system has for processes of the server, and which of them are up.

means()                                 # Walls(landlock=7, seccomp=True): what there could be
check("require")                        # raises SettingError where something is missing
print(Walls(landlock=7, seccomp=True))  # "files (Landlock 7), calls (seccomp)"
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from weft.errors import SettingError

from . import landlock, seccomp


@dataclass(frozen=True)
class Walls:
    """`landlock`: its version, 0 for none. `alone`: no thread was there before it was up."""

    landlock: int = 0
    seccomp: bool = False
    alone: bool = True

    @property
    def missing(self) -> list[str]:
        """What is not there, in words."""
        found: list[str] = []
        if self.landlock < landlock.NEEDED:
            which = f"version {self.landlock}" if self.landlock else "none"
            found.append(f"Landlock {landlock.NEEDED} (this kernel has {which})")
        elif not self.alone:
            found.append("Landlock in threads that libraries had started before")
        if not self.seccomp:
            found.append("seccomp")
        return found

    def __str__(self) -> str:
        up = [f"files (Landlock {self.landlock})"] if self.landlock >= landlock.NEEDED else []
        up += ["calls (seccomp)"] if self.seccomp else []
        said = ", ".join(up) or "no kernel sandbox"
        return f"{said}; missing: {', '.join(self.missing)}" if self.missing else said


def means() -> Walls:
    """What this system could put up."""
    if sys.platform != "linux":
        return Walls()
    return Walls(landlock=landlock.abi(), seccomp=seccomp.available())


def told(mode: str) -> str:
    """What an operator reads about the sandbox of a server with this setting."""
    return "off" if mode == "off" else str(means())


def short(mode: str) -> str:
    """The same in a word, for everybody: `on`, `partial` or `off`."""
    walls = means()
    if mode == "off" or not (walls.landlock or walls.seccomp):
        return "off"
    return "partial" if walls.missing else "on"


def check(mode: str) -> None:
    """Raises `SettingError` where `mode` is none, or asks for what is not there."""
    if mode not in ("auto", "require", "off"):
        raise SettingError(
            f"sandbox is {mode!r}, which is none of its values", fix="auto, require or off"
        )
    missing = means().missing if mode == "require" else []
    if missing:
        raise SettingError(
            f"sandbox is 'require', but this system lacks {', '.join(missing)}",
            fix="serve on Linux 5.19 or later, with both turned on, or with sandbox = 'auto'",
        )
