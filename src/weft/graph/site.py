"""Addresses: where in a model, and where in the user's file.

A `Site` names one place at which a tensor can be read or changed while the model runs:

    Site(path="transformer.h.5.mlp", port="output")          # what the module returns
    Site(path="transformer.h.5", port="inputs", call=1)      # (args, kwargs) of its second call

`path` is the module's own dotted path ("" is the root). A site's value is a structure (tensor,
tuple, dict, ...); a `leaf` is the path of keys to one tensor in it, `()` for a bare tensor. The
structure of the port `inputs` is `(args, kwargs)`, so `.input` in user code is a leaf such as
`(0, 0)` or `(1, "hidden_states")` of `inputs`.

`step` counts turns of the driving loop (one forward in `trace`, so 0), `call` counts calls of the
module within one step. `invoke` numbers the inputs of a block that has several: each has sites of
its own, with the shape and content that they have when it runs alone.
"""

from msgspec import Struct

Leaf = tuple[str | int, ...]

PORTS = ("inputs", "output")


class Site(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One place in the model at one moment."""

    path: str
    port: str
    call: int = 0
    step: int = 0
    invoke: int = 0

    def __str__(self) -> str:
        where = f"{self.path or '<root>'}.{self.port}"
        call = f" call {self.call}" if self.call else ""
        step = f" step {self.step}" if self.step else ""
        invoke = f" of invoke {self.invoke}" if self.invoke else ""
        return where + call + step + invoke


class Where(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A line of the user's source."""

    file: str
    line: int
    text: str = ""

    def __str__(self) -> str:
        text = f": {self.text}" if self.text else ""
        return f"{self.file}:{self.line}{text}"


def leaf_text(leaf: Leaf) -> str:
    """`(0, 'x')` as `[0]['x']`, the way a user would index the structure."""
    return "".join(f"[{key!r}]" for key in leaf)
