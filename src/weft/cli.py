"""The command line: `weft demo`, `weft show FILE`, `weft version`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from weft.errors import WeftError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (2 for a mistake of the user's)."""
    options = _parser().parse_args(argv)
    try:
        return options.run(options) or 0
    except WeftError as error:
        print(f"weft: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weft", description="Experiments on the inside of neural networks."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="the main job on the tiny model that ships with Weft")
    demo.set_defaults(run=_demo)
    show = commands.add_parser("show", help="print a graph file")
    show.add_argument("file")
    show.set_defaults(run=_show)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from weft.demo import demo

    demo()


def _show(options: argparse.Namespace) -> None:
    from weft.handles.experiment import Experiment

    print(Experiment.load(options.file))


def _version(options: argparse.Namespace) -> None:
    from weft import __version__

    print(f"weft {__version__}")
