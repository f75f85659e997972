"""`weft keys`: who is let in at a server on this machine."""

from __future__ import annotations

import argparse
import time

from weft.settings import data_folder

from .options import Commands, add_settings, settings_of


def register(commands: Commands) -> None:
    keys = commands.add_parser("keys", help="make, list and revoke the keys of a server here")
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    add = actions.add_parser("add", help="make a key; it is shown this once")
    add.add_argument("owner", help="who it stands for: letters, digits, - and _")
    revoke = actions.add_parser("revoke", help="let a key in no more")
    revoke.add_argument("digest", help="the beginning of its digest, as `weft keys list` shows it")
    for name, parser in (("add", add), ("list", actions.add_parser("list")), ("revoke", revoke)):
        add_settings(parser, "data")
        parser.set_defaults(run=_keys, action=name)


def _keys(options: argparse.Namespace) -> None:
    from weft.service.fleet.keys import add_key, open_keys, revoke_key, show_keys

    with open_keys(data_folder(settings_of(options))) as ledger:
        if options.action == "add":
            print(add_key(ledger, options.owner, time.time()))
        elif options.action == "revoke":
            revoke_key(ledger, options.digest, time.time())
        else:
            print(show_keys(ledger))
