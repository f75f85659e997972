"""API keys: made once, shown once, kept as a digest.

    key = new_key()                        # "weft_" and 43 characters: 256 bits
    ledger.add_key(Key(owner, digest(key), now))
    find(ledger, key)                      # its Key; None for any other text

A fast digest is enough, as nobody can try 2**256 keys; only people's passwords need slow ones.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from weft.service.store.interface import Key, Ledger

_KEY = re.compile(r"weft_[A-Za-z0-9_-]{43}")


def new_key() -> str:
    return f"weft_{secrets.token_urlsafe(32)}"


def digest(key: str) -> str:
    """SHA-256, in hex: what the store has of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def same(key: str, digest_: str) -> bool:
    """Whether the digest is this key's, in a time that tells nothing of where they differ."""
    return hmac.compare_digest(digest(key).encode(), digest_.encode())


def find(ledger: Ledger, key: str) -> Key | None:
    """The key in force that this text is. Looking it up by digest tells nothing of other keys."""
    if not _KEY.fullmatch(key):
        return None
    found = ledger.key(digest(key))
    return found if found is not None and same(key, found.digest) else None
