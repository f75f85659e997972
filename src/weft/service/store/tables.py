"""The tables of the SQLite ledger, version by version, and rows that are no plain tuples.

A data folder of an older version is led to this one when it is opened; never the other way.
"""

from __future__ import annotations

from typing import Any

import msgspec

from weft.service.store.interface import Key
from weft.service.store.session_rows import TABLES as SESSION_TABLES
from weft.service.store.sqlite_fair import PACE_TABLES
from weft.service.store.sqlite_fair import TABLES as FAIR_TABLES
from weft.service.store.sqlite_kept import TABLES as KEPT_TABLES
from weft.service.store.sqlite_models import TABLES as MODEL_TABLES
from weft.service.store.sqlite_tallies import TABLES as TALLY_TABLES
from weft.service.store.sqlite_usage import SPACE_TABLES
from weft.service.store.sqlite_usage import TABLES as USAGE_TABLES

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE job (
            id TEXT PRIMARY KEY, owner TEXT NOT NULL, request_id TEXT NOT NULL,
            model TEXT NOT NULL, state TEXT NOT NULL, created REAL NOT NULL,
            holder TEXT, token TEXT, until REAL, ended REAL, body BLOB NOT NULL,
            UNIQUE (owner, request_id)
        ) STRICT""",
        "CREATE INDEX job_of_owner ON job (owner, id)",
        "CREATE INDEX job_alive ON job (model, state, created, id) WHERE ended IS NULL",
        "CREATE INDEX job_alive_of_owner ON job (owner, state) WHERE ended IS NULL",
        "CREATE INDEX job_held ON job (until, holder) WHERE token IS NOT NULL",
        "CREATE INDEX job_ended ON job (ended) WHERE ended IS NOT NULL",
        """CREATE TABLE note (
            job TEXT NOT NULL REFERENCES job ON DELETE CASCADE, seq INTEGER NOT NULL,
            kind TEXT NOT NULL, data BLOB NOT NULL, PRIMARY KEY (job, seq)
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE key (
            owner TEXT NOT NULL, digest TEXT PRIMARY KEY, created REAL NOT NULL, revoked REAL
        ) STRICT""",
        """CREATE TABLE question (
            id TEXT PRIMARY KEY, kind TEXT NOT NULL, owner TEXT NOT NULL, body BLOB NOT NULL,
            answer BLOB, ok INTEGER NOT NULL, created REAL NOT NULL,
            taken INTEGER NOT NULL DEFAULT 0
        ) STRICT""",
        """CREATE TABLE card (
            model TEXT PRIMARY KEY, state TEXT NOT NULL, fingerprint TEXT NOT NULL,
            card BLOB NOT NULL, tables BLOB NOT NULL, reason TEXT
        ) STRICT""",
    ),
    (  # keys from before have the scopes `run` and `read`, and all models
        """ALTER TABLE key ADD COLUMN scopes TEXT NOT NULL DEFAULT '["run","read"]'""",
        "ALTER TABLE key ADD COLUMN models TEXT NOT NULL DEFAULT '[]'",
        "ALTER TABLE key ADD COLUMN expires REAL",
        "ALTER TABLE key ADD COLUMN weight REAL NOT NULL DEFAULT 1.0",
        "ALTER TABLE key ADD COLUMN limits TEXT NOT NULL DEFAULT '{}'",
        "ALTER TABLE key ADD COLUMN used REAL",
    ),
    MODEL_TABLES,
    FAIR_TABLES,
    USAGE_TABLES,
    SESSION_TABLES,
    SPACE_TABLES,
    TALLY_TABLES,
    (
        """CREATE TABLE object (
            name TEXT PRIMARY KEY, data BLOB NOT NULL, touched REAL NOT NULL
        ) STRICT""",
    ),
    PACE_TABLES,
    KEPT_TABLES,
)
"""What leads from each version of the tables to the next. Never change one: add one."""

# -- keys ----------------------------------------------------------------------------------------

KEY = "owner, digest, created, revoked, scopes, models, expires, weight, limits, used"
_JSON: dict[str, Any] = {
    "scopes": tuple[str, ...],
    "models": tuple[str, ...],
    "limits": dict[str, float],
}


def row_of(key: Key) -> tuple[object, ...]:
    """A key as a row: what is no single value is JSON."""
    fields = msgspec.structs.asdict(key)
    for name in _JSON:
        fields[name] = msgspec.json.encode(fields[name]).decode()
    return tuple(fields.values())


def key_of(row: tuple) -> Key:
    fields = dict(zip(Key.__struct_fields__, row, strict=True))
    for name, kind in _JSON.items():
        fields[name] = msgspec.json.decode(fields[name], type=kind)
    return Key(**fields)
