"""`weft deploy`, `weft evict`, `weft list`: the models of a server that runs.

They ask it over HTTP with a key, as clients do; `deploy` and `evict` need the scope `deploy`.
"""

from __future__ import annotations

import argparse
from typing import Any

from .options import Commands, add_server


def register(commands: Commands) -> None:
    deploy = commands.add_parser("deploy", help="one more model for a server that runs")
    deploy.add_argument(
        "model", help="a folder that its operator allows (model_roots), or an id (model_hub)"
    )
    deploy.add_argument("--name", help="what clients call it; else the folder's name, or the id")
    deploy.add_argument("--pin", action="store_true", help="load it at once, and keep it loaded")
    deploy.add_argument("--dtype", help="such as bfloat16")
    deploy.add_argument("--attn-implementation", help="eager, sdpa, ...")
    deploy.add_argument("--device", help="where the weights go, such as cuda")
    evict = commands.add_parser("evict", help="take a model of a server that runs out of memory")
    evict.add_argument("name", help="as `weft list` shows it")
    evict.add_argument(
        "--forget", action="store_true", help="off the server, too; one that was deployed"
    )
    models = commands.add_parser("list", help="the models of a server, and how they are")
    models.add_argument("--json", action="store_true", help="as JSON, for programs")
    for parser, run in ((deploy, _deploy), (evict, _evict), (models, _list)):
        add_server(parser)
        parser.set_defaults(run=run)


def _deploy(options: argparse.Namespace) -> None:
    from weft.client import catalog
    from weft.wire.messages import Deploy

    query = Deploy(
        source=options.model,
        name=options.name,
        pinned=options.pin,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        device=options.device,
    )
    _show(options, catalog.deploy, query)


def _evict(options: argparse.Namespace) -> None:
    from weft.client import catalog
    from weft.wire.messages import Evict

    _show(options, catalog.evict, Evict(model=options.name, forget=options.forget))


def _show(options: argparse.Namespace, asked: Any, query: Any) -> None:
    from weft.client import catalog, sync
    from weft.client.core import Talk
    from weft.client.servers import server_at

    server = server_at(options.server or True)
    print(catalog.Models([sync.run(server, asked(Talk(server), query))]))


def _list(options: argparse.Namespace) -> None:
    from weft.client import catalog
    from weft.wire.messages import ModelList, encode

    models = catalog.models(options.server or True)
    if options.json:
        print(encode(ModelList(models=tuple(models)), "json").decode())
    else:
        print(models)
