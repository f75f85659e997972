"""Asking: one small `Backend` interface, the local one behind it, and the remote one.

`effects` says what a conversation with a server may want, `core` holds the conversations as
generators, `sync` and `aio` drive them over HTTP.
"""

from .servers import close

__all__ = ["close"]
