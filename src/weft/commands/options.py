"""What commands share: the subparsers they add to, and options for settings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from weft.settings import TEXTS, Settings, load

CLIENT_SETTINGS = ("host", "key", "connect_seconds", "retry_seconds", "progress")
"""Settings of whoever asks a server; a server has no option for them."""

Commands = Any
"""What `argparse` calls `_SubParsersAction`: its `add_parser` makes one more command."""


class Strict(argparse.ArgumentParser):
    """Takes options by their whole names only: `--key` is not `--key-only`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)


def add_settings(parser: argparse.ArgumentParser, *only: str) -> None:
    """An option for each setting of a server, or for those named."""
    for field in fields(Settings):
        if field.name in CLIENT_SETTINGS or (only and field.name not in only):
            continue
        kind = str if field.default is None else type(field.default)
        option, text = f"--{field.name.replace('_', '-')}", TEXTS[field.name]
        if kind is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(option, type=kind, metavar=kind.__name__, help=text)


def add_server(parser: argparse.ArgumentParser) -> None:
    """Which server is asked."""
    parser.add_argument(
        "--server",
        metavar="URL",
        help="its address; else WEFT_HOST, or the only one that runs on this machine",
    )


def settings_of(
    options: argparse.Namespace, more: tuple[Mapping[str, Any], str] | None = None
) -> Settings:
    """The settings of a server: its options, then the environment, then its own file (`more`: what
    it says, and its name), then the user's."""
    names = [field.name for field in fields(Settings) if field.name not in CLIENT_SETTINGS]
    return load(more=more, **{name: getattr(options, name, None) for name in names})
