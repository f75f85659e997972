"""The command line's commands: a file for each group, which says its options and carries them out.

A file has `register(commands)`, which `weft.cli` calls with its subparsers; to add a group, write
one and name it there. What a command needs it imports when it runs: `weft --help` loads no torch.
"""
