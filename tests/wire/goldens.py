"""Golden files of messages: bytes that were once sent, and must keep their meaning.

python -m tests.wire.goldens      # writes the files that are missing, changes none
"""

from __future__ import annotations

from pathlib import Path

from tests.wire.instances import INSTANCES
from weft.wire.messages import encode

FOLDER = Path(__file__).parent.parent / "golden" / "messages"
FORMS = ("msgpack", "json")


def golden(name: str, form: str) -> Path:
    return FOLDER / f"{name}.{form}"


def write_missing() -> list[Path]:
    """Writes a file for each instance that has none; one that is there is history."""
    missing = [(n, f) for n in INSTANCES for f in FORMS if not golden(n, f).exists()]
    for name, form in missing:
        golden(name, form).write_bytes(encode(INSTANCES[name], form))
    return [golden(name, form) for name, form in missing]


if __name__ == "__main__":
    for path in write_missing():
        print(path.name)
