"""`weft serve`: models, served until Ctrl-C."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .options import Commands, add_settings, settings_of


def register(commands: Commands) -> None:
    serve = commands.add_parser(
        "serve", help="serve models to experiments with remote=True, until Ctrl-C"
    )
    serve.add_argument(
        "model",
        nargs="*",
        help="a folder or an id on the hub; NAME=MODEL gives it another name for clients",
    )
    serve.add_argument("--config", metavar="FILE", help="a file with settings and models (TOML)")
    serve.add_argument("--dtype", help="of all models, such as bfloat16")
    serve.add_argument("--attn-implementation", help="eager, sdpa, ...")
    serve.add_argument("--device", help="where the weights go, such as cuda")
    serve.add_argument(
        "--key-only",
        action="store_true",
        help="make no key for this machine's user: only those of `weft keys create` are let in",
    )
    add_settings(serve)
    serve.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> None:
    from weft import __version__
    from weft.service.fleet.config import read_config
    from weft.service.fleet.models import checked, parse_all
    from weft.service.fleet.serve import serve
    from weft.service.fleet.supervisor import show

    how = {name: getattr(options, name) for name in ("dtype", "attn_implementation", "device")}
    models, more = parse_all(options.model, **how), None
    if options.config is not None:
        listed, settings = read_config(Path(options.config))
        models, more = checked([*models, *listed]), (settings, options.config)
    serve(
        models,
        settings_of(options, more),
        key_only=options.key_only,
        say=lambda text: show(text, sys.stdout),
        version=__version__,
    )
