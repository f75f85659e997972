"""The command line: `weft demo`, `weft serve`, `weft keys`, `weft show`, `weft version`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from weft.errors import WeftError
from weft.settings import TEXTS, Settings, data_folder, load

CLIENT_SETTINGS = ("host", "key", "connect_seconds", "retry_seconds", "progress")


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


class _Strict(argparse.ArgumentParser):
    """Takes options by their whole names only: `--key` is not `--key-only`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)


def _parser() -> argparse.ArgumentParser:
    parser = _Strict(prog="weft", description="Experiments on the inside of neural networks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="the main job on the tiny model that ships with Weft")
    demo.set_defaults(run=_demo)
    _add_serve(commands)
    _add_keys(commands)
    show = commands.add_parser("show", help="print a graph file")
    show.add_argument("file")
    show.set_defaults(run=_show)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return parser


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve", help="serve models to experiments with remote=True, until Ctrl-C"
    )
    serve.add_argument(
        "model",
        nargs="+",
        help="a folder or an id on the hub; NAME=MODEL gives it another name for clients",
    )
    serve.add_argument("--dtype", help="of all models, such as bfloat16")
    serve.add_argument("--attn-implementation", help="eager, sdpa, ...")
    serve.add_argument("--device", help="where the weights go, such as cuda")
    serve.add_argument(
        "--key-only",
        action="store_true",
        help="make no key for this machine's user: only those of `weft keys add` are let in",
    )
    _add_settings(serve)
    serve.set_defaults(run=_serve)


def _add_settings(parser: argparse.ArgumentParser, *only: str) -> None:
    """An option for each setting of a server."""
    for field in fields(Settings):
        if field.name in CLIENT_SETTINGS or (only and field.name not in only):
            continue
        kind = str if field.default is None else type(field.default)
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=kind, metavar=kind.__name__, help=TEXTS[field.name])


def _settings(options: argparse.Namespace) -> Settings:
    names = [field.name for field in fields(Settings) if field.name not in CLIENT_SETTINGS]
    return load(**{name: getattr(options, name, None) for name in names})


def _serve(options: argparse.Namespace) -> None:
    from weft import __version__
    from weft.service.fleet.models import parse_all
    from weft.service.fleet.serve import serve
    from weft.service.fleet.supervisor import show

    how = {name: getattr(options, name) for name in ("dtype", "attn_implementation", "device")}
    serve(
        parse_all(options.model, **how),
        _settings(options),
        key_only=options.key_only,
        say=lambda text: show(text, sys.stdout),
        version=__version__,
    )


def _add_keys(commands: Any) -> None:
    keys = commands.add_parser("keys", help="make, list and revoke the keys of a server here")
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    add = actions.add_parser("add", help="make a key; it is shown this once")
    add.add_argument("owner", help="who it stands for: letters, digits, - and _")
    revoke = actions.add_parser("revoke", help="let a key in no more")
    revoke.add_argument("digest", help="the beginning of its digest, as `weft keys list` shows it")
    for name, parser in (("add", add), ("list", actions.add_parser("list")), ("revoke", revoke)):
        _add_settings(parser, "data")
        parser.set_defaults(run=_keys, action=name)


def _keys(options: argparse.Namespace) -> None:
    from weft.service.fleet.keys import add_key, open_keys, revoke_key, show_keys

    with open_keys(data_folder(_settings(options))) as ledger:
        if options.action == "add":
            print(add_key(ledger, options.owner, time.time()))
        elif options.action == "revoke":
            revoke_key(ledger, options.digest, time.time())
        else:
            print(show_keys(ledger))


def _demo(options: argparse.Namespace) -> None:
    from weft.demo import demo

    demo()


def _show(options: argparse.Namespace) -> None:
    from weft.handles.experiment import Experiment

    print(Experiment.load(options.file))


def _version(options: argparse.Namespace) -> None:
    from weft import __version__

    print(f"weft {__version__}")
