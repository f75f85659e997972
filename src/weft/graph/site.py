"""Addresses: where in a model, and where in the user's file.

A `Site` names one place at which a tensor can be read or changed while the model runs:

    Site(path="transformer.h.5.mlp", port="output")          # what the module returns
    Site(path="transformer.h.5", port="inputs", call=1)      # (args, kwargs) of its second call
    Site("transformer.h.5.mlp", "source.self_act_0.output")  # what an operation inside it gives

`path` is the module's own dotted path ("" is the root). A site's value is a structure (tensor,
tuple, dict, ...); a `leaf` is the path of keys to one tensor in it, `()` for a bare tensor. The
structure of the port `inputs` is `(args, kwargs)`, so `.input` in user code is a leaf such as
`(0, 0)` or `(1, "hidden_states")` of `inputs`.

A port may go inside the module's `forward`: `source.<operation>.inputs` and `.output` are those of
one call in its source (`sources.listing`), `source.<a>.source.<b>.output` is in the function that
operation `a` calls. `call` then counts how often the operation has run within the step.

`step` counts turns of the driving loop (one forward in `trace`, so 0; in `generate` one for each
token), `call` counts calls of the module within one step. `invoke` numbers the inputs of a block
that has several: each has sites of its own, with the shape and content that they have when it runs
alone.
"""

from msgspec import Struct

Leaf = tuple[str | int, ...]

PORTS = ("inputs", "output")
INSIDE = "source."
"""How a port inside a forward begins; and again, for one inside a function that it calls."""


def is_inside(port: str) -> bool:
    """Whether a port is that of an operation inside a forward."""
    return "." in port


def split_port(port: str) -> tuple[str, str]:
    """`source.a.output` as (`source.a.`, `output`); of a module's own port the first is empty."""
    inside, dot, last = port.rpartition(".")
    return inside + dot, last


def operations_of(port: str) -> tuple[str, ...]:
    """`("a", "b")` of `source.a.source.b.output`; none of a module's own port."""
    return tuple(port.split(".")[1::2]) if "." in port else ()


def inside_of(operations: tuple[str, ...]) -> str:
    """The reverse, without the last word: `source.a.source.b.`."""
    return "".join([f"{INSIDE}{name}." for name in operations])


def begin_port(port: str) -> str:
    """Where begins what has this port: `source.a.inputs` of `source.a.output`."""
    return split_port(port)[0] + "inputs"


RESULT = "result"
"""The port of the root at which a generation gives its token ids, after its last step."""


class Site(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One place in the model at one moment."""

    path: str
    port: str
    call: int = 0
    step: int = 0
    invoke: int = 0

    def __str__(self) -> str:
        where = f"{self.path or '<root>'}.{self.port}"
        if self.port == RESULT:
            where = "the generated ids"
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
