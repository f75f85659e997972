"""`weft demo`, `weft show`, `weft version`: what needs no server."""

from __future__ import annotations

import argparse

from .options import Commands


def register(commands: Commands) -> None:
    demo = commands.add_parser("demo", help="the main job on the tiny model that ships with Weft")
    demo.set_defaults(run=_demo)
    show = commands.add_parser("show", help="print a graph file")
    show.add_argument("file")
    show.set_defaults(run=_show)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)


def _demo(options: argparse.Namespace) -> None:
    from weft.demo import demo

    demo()


def _show(options: argparse.Namespace) -> None:
    from weft.handles.experiment import Experiment

    print(Experiment.load(options.file))


def _version(options: argparse.Namespace) -> None:
    from weft import __version__

    print(f"weft {__version__}")
