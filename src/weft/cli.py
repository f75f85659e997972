"""The command line: `weft serve`, `weft jobs`, `weft keys`, ...: a group each in `commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from weft.commands import deploy, jobs, keys, local, serve, watch
from weft.commands.options import Strict
from weft.errors import WeftError

GROUPS = (serve, deploy, jobs, watch, keys, local)
"""Whose commands there are, as `weft --help` tells them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (2 for a mistake of the user's)."""
    options = _parser().parse_args(argv)
    try:
        return options.run(options) or 0
    except WeftError as error:
        print(f"weft: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Strict(prog="weft", description="Experiments on the inside of neural networks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in GROUPS:
        group.register(commands)
    return parser
