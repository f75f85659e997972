"""`weft keys`: who is let in at a server on this machine, what each may do, and what each used."""

from __future__ import annotations

import argparse
import time

from weft.settings import data_folder

from .options import Commands, add_settings, settings_of


def register(commands: Commands) -> None:
    keys = commands.add_parser("keys", help="make, list and revoke the keys of a server here")
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    for name, text in (("create", "make a key; it is shown this once"), ("add", "the same")):
        _add_create(actions.add_parser(name, help=text))
    _done(actions.add_parser("list", help="who is let in, and to what"), _list)
    revoke = actions.add_parser("revoke", help="let a key in no more")
    revoke.add_argument("digest", help="the beginning of its digest, as `weft keys list` shows it")
    _done(revoke, _revoke)
    usage = actions.add_parser("usage", help="what was used, by day, owner and model")
    usage.add_argument("--owner", help="of one owner only")
    usage.add_argument("--since", default="", help="from this day (UTC) on, such as 2030-01-31")
    _done(usage, _usage)


def _add_create(create: argparse.ArgumentParser) -> None:
    create.add_argument("owner", nargs="?", help="who it stands for: letters, digits, - and _")
    create.add_argument("--owner", dest="named", metavar="OWNER", help="the same")
    create.add_argument(
        "--scope",
        action="append",
        default=[],
        help="what it may do: run, read, deploy, metrics, admin; several times for several "
        "(run and read, if none is given)",
    )
    create.add_argument(
        "--model", action="append", default=[], help="a model that it may use (all, if none)"
    )
    create.add_argument("--expires", help="12h, 30d, 2w from now, or a day such as 2030-01-31")
    create.add_argument(
        "--weight", type=float, default=1.0, help="its share of a worker, beside others' 1"
    )
    create.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="a setting that is another for it, such as queued_jobs=100",
    )
    _done(create, _create)


def _done(parser: argparse.ArgumentParser, run: object) -> None:
    add_settings(parser, "data")
    parser.set_defaults(run=run)


def _create(options: argparse.Namespace) -> None:
    from weft.errors import SettingError
    from weft.service.fleet.keys import add_key, open_keys
    from weft.service.fleet.keyspec import fields_of

    owner = options.owner or options.named
    if owner is None or (options.owner and options.named):
        raise SettingError("a key has one owner", fix="weft keys create OWNER")
    now = time.time()
    fields = fields_of(
        scopes=options.scope,
        models=options.model,
        expires=options.expires,
        weight=options.weight,
        limits=options.limit,
        now=now,
    )
    with open_keys(data_folder(settings_of(options))) as ledger:
        print(add_key(ledger, owner, now, **fields))


def _list(options: argparse.Namespace) -> None:
    from weft.service.fleet.keys import open_keys
    from weft.service.fleet.keyspec import show_keys

    with open_keys(data_folder(settings_of(options))) as ledger:
        print(show_keys(ledger, time.time()))


def _revoke(options: argparse.Namespace) -> None:
    from weft.service.fleet.keys import open_keys, revoke_key

    with open_keys(data_folder(settings_of(options))) as ledger:
        revoke_key(ledger, options.digest, time.time())


def _usage(options: argparse.Namespace) -> None:
    from weft.service.fleet.keys import open_keys
    from weft.service.fleet.keyspec import day_in, show_usage

    since = day_in(options.since)
    with open_keys(data_folder(settings_of(options))) as ledger:
        print(show_usage(ledger.usage(options.owner, since)))
