"""Random programs on the sites of a `Tower`: their source, their orders, and the same by hand.

A program is a list of statements, each one line of a block. `may_swap` says which lines are
independent; `by_hooks` says what the program means, with plain forward hooks and without Weft.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

from .tower import LAYERS, WIDTH, Tower

BATCH, LENGTH = 2, 5

# Every site holds [BATCH, LENGTH, WIDTH]; in firing order. (text, module path, port)
SITES: list[tuple[str, str, str]] = [("model.embed.output", "embed", "output")]
for _i in range(LAYERS):
    SITES += [
        (f"model.blocks[{_i}].input", f"blocks.{_i}", "input"),
        (f"model.blocks[{_i}].mix.output[0]", f"blocks.{_i}.mix", "output"),
        (f"model.blocks[{_i}].mlp.input", f"blocks.{_i}.mlp", "input"),
        (f"model.blocks[{_i}].mlp.output", f"blocks.{_i}.mlp", "output"),
        (f"model.blocks[{_i}].output", f"blocks.{_i}", "output"),
    ]
SITES += [("model.norm.input", "norm", "input"), ("model.norm.output", "norm", "output")]

# What may be done with values, written once: `eval` gives the same to Weft and to the oracle.
UNARY = ["{a} * 0.5", "torch.tanh({a})", "{a}.flip(1)", "{a} - {a}.mean(1, keepdim=True)"]
BINARY = ["{a} + {b}", "{a} * {b} - 1", "torch.where({a} > 0, {b}, {a})", "{a}.maximum({b})"]
PARTS = ["...", ":, -1", ":, 1:3", "0", ":, :, ::2"]


@dataclass(frozen=True)
class Line:
    """One statement: what it reads, changes and makes. `site` is an index into `SITES`."""

    kind: str
    text: str
    makes: str = ""
    uses: tuple[str, ...] = ()
    changes: str = ""  # the variable that is edited in place
    site: int | None = None
    part: str = "..."
    value: str = ""  # expression of what is written, or of what is made


# --- drawing --------------------------------------------------------------------------------------


@dataclass
class _Draft:
    """A program while it is drawn: names of tensors, and when each of them exists."""

    times: dict[str, int]
    pool: list[int]  # few sites, so that statements meet
    homes: dict[str, int] = field(default_factory=dict)  # reads: their site
    stale: set[str] = field(default_factory=set)
    lines: list[Line] = field(default_factory=list)

    def name(self, letter: str) -> str:
        return f"{letter}{len(self.lines)}"


@st.composite
def programs(draw: Any) -> list[Line]:
    """3 to 12 statements. In one of three programs edits may come too late or be stale."""
    pool = st.lists(st.integers(0, len(SITES) - 1), min_size=2, max_size=4, unique=True)
    draft = _Draft({"c0": -1, "c1": -1}, draw(pool))
    wild = draw(st.sampled_from([False, True, False]))
    for kind in draw(st.lists(st.sampled_from(sorted(_DRAW)), min_size=3, max_size=12)):
        line = _DRAW[kind](draw, draft, wild)
        if line is not None:
            draft.lines.append(line)
    names = [name for name in draft.times if name not in ("c0", "c1")]
    for name in draw(st.lists(st.sampled_from(names), max_size=3, unique=True)) if names else []:
        draft.lines.append(Line("save", f"{name}.save('{name}')", uses=(name,)))
    draft.lines.append(Line("logits", "model.head.output.save('logits')"))
    return draft.lines


def _read(draw: Any, draft: _Draft, wild: bool) -> Line:
    site = draw(st.sampled_from(draft.pool))
    name = draft.name("r")
    draft.times[name] = draft.homes[name] = site
    return Line("read", f"{name} = {SITES[site][0]}", makes=name, site=site)


def _derive(draw: Any, draft: _Draft, wild: bool) -> Line | None:
    names = list(draft.times)
    if not names[2:]:
        return None  # of constants alone it would be an ordinary tensor
    a, b = draw(st.sampled_from(names[2:])), draw(st.sampled_from(names))
    value = draw(st.sampled_from(UNARY + BINARY)).format(a=a, b=b)
    uses = (a, b) if b in value else (a,)
    name = draft.name("d")
    draft.times[name] = max(draft.times[one] for one in uses)
    return Line("derive", f"{name} = {value}", makes=name, uses=uses, value=value)


def _edit(draw: Any, draft: _Draft, wild: bool, kind: str) -> Line | None:
    """`site = value` or `site[part] = value` or `site[part] += value`."""
    site = draw(st.sampled_from(draft.pool))
    source = _source(draw, draft, wild, site)
    text, part = SITES[site][0], draw(st.sampled_from(PARTS))
    draft.stale |= {name for name, home in draft.homes.items() if home == site}
    if kind == "write":
        return Line(kind, f"{text} = {source}", uses=(source,), site=site, value=source)
    sign = "+=" if kind == "add" else "="
    value = f"{source}[{part}]"
    line = f"{text}[{part}] {sign} {value}"
    return Line(kind, line, uses=(source,), site=site, part=part, value=value)


def _change(draw: Any, draft: _Draft, wild: bool) -> Line | None:
    """`name[part] *= value`: of a read, that edits the site."""
    names = sorted(set(draft.times) - {"c0", "c1"} - (set() if wild else draft.stale))
    if not names:
        return None
    name = draw(st.sampled_from(names))
    site = draft.homes.get(name)
    source = _source(draw, draft, wild, len(SITES) if site is None else site)
    if source == name:
        return None
    part = draw(st.sampled_from(PARTS))
    if site is None:
        draft.times[name] = max(draft.times[name], draft.times[source])
    else:
        mine = {other for other, home in draft.homes.items() if home == site}
        draft.stale |= mine - {name}
    return Line(
        "change",
        f"{name}[{part}] *= {source}[{part}]",
        uses=(source,),
        changes=name,
        site=site,
        part=part,
        value=f"{source}[{part}]",
    )


def _source(draw: Any, draft: _Draft, wild: bool, site: int) -> str:
    """A tensor to write; one that exists in time unless the program is wild."""
    names = [name for name, time in draft.times.items() if wild or time <= site]
    return draw(st.sampled_from(sorted(names)))


_DRAW: dict[str, Callable[..., Line | None]] = {
    "read": _read,
    "read again": _read,
    "derive": _derive,
    "write": lambda draw, draft, wild: _edit(draw, draft, wild, "write"),
    "fill": lambda draw, draft, wild: _edit(draw, draft, wild, "fill"),
    "add": lambda draw, draft, wild: _edit(draw, draft, wild, "add"),
    "change": _change,
}


# --- orders ---------------------------------------------------------------------------------------

_EDITS = {"write", "fill", "add", "change"}


def may_swap(first: Line, second: Line) -> bool:
    """Whether two statements mean the same in either order."""
    touched = {first.makes, first.changes} - {""}
    if touched & {*second.uses, second.changes}:
        return False
    if second.changes and second.changes in (*first.uses, first.changes):
        return False
    same_site = first.site is not None and first.site == second.site
    return not (same_site and (first.kind in _EDITS or second.kind in _EDITS))


def reordered(lines: list[Line], choose: Callable[[int], int]) -> list[Line]:
    """Another order of the same program; `choose(n)` picks one of n lines that may come next."""
    left, out = list(lines), []
    while left:
        ready = [
            line
            for place, line in enumerate(left)
            if all(may_swap(before, line) for before in left[:place])
        ]
        line = ready[choose(len(ready))]
        left.remove(line)
        out.append(line)
    return out


def source(lines: list[Line]) -> str:
    return "\n".join(["with model.trace(ids) as tracer:", *(f"    {line.text}" for line in lines)])


# --- the same by hand -----------------------------------------------------------------------------


class Refused(Exception):
    """The program cannot be run by any order of hooks."""


class _Snapshot:
    """What a site held between two of its edits; filled by a hook."""

    def __init__(self, site: int) -> None:
        self.time = site
        self.tensor: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        assert self.tensor is not None, "used before its site fired"
        return self.tensor


class _Made:
    """A value computed from others, once, when it is first wanted."""

    def __init__(self, compute: Callable[..., torch.Tensor], *parts: Any) -> None:
        self.compute, self.parts = compute, parts
        self.time = max((part.time for part in parts), default=-1)
        self.tensor: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        if self.tensor is None:
            self.tensor = self.compute(*[part.get() for part in self.parts])
        return self.tensor


def by_hooks(net: Tower, ids: torch.Tensor, lines: list[Line], constants: dict) -> dict:
    """What a program saves, with plain hooks; raises `Refused` for a late or a stale edit."""
    names: dict[str, Any] = {
        key: _Made(lambda kept=tensor: kept.clone()) for key, tensor in constants.items()
    }
    homes: dict[str, int] = {}  # reads: site; dropped once another edit of the site came
    todo: list[list[Callable[[torch.Tensor], torch.Tensor]]] = [[] for _ in SITES]
    saved: dict[str, Any] = {}

    def value_of(line: Line, **more: Any) -> _Made:
        wanted = dict.fromkeys(line.uses)
        code = compile(line.value, "<value>", "eval")

        def compute(*tensors: torch.Tensor) -> torch.Tensor:
            return eval(code, {"torch": torch, **dict(zip(wanted, tensors, strict=True))})

        return _Made(compute, *[names[name] for name in wanted])

    def edit(site: int, value: Any, change: Callable[..., torch.Tensor], keep: str = "") -> None:
        if value.time > site:
            raise Refused(f"late edit of {SITES[site][0]}")
        todo[site].append(lambda now: change(now, value.get()))
        for name, home in list(homes.items()):
            if home == site and name != keep:
                homes[name] = -1

    def look(site: int) -> _Snapshot:
        snapshot = _Snapshot(site)

        def take(now: torch.Tensor) -> torch.Tensor:
            snapshot.tensor = now.clone()
            return now

        todo[site].append(take)
        return snapshot

    for line in lines:
        site: Any = line.site
        if line.kind == "read":
            names[line.makes] = look(site)
            homes[line.makes] = site
        elif line.kind == "derive":
            names[line.makes] = value_of(line)
        elif line.kind == "save":
            saved[line.uses[0]] = names[line.uses[0]]
        elif line.kind == "write" and homes.get(line.value) == site:
            pass  # the site's own tensor, which is there anyway
        elif line.kind == "write":
            edit(site, value_of(line), lambda now, new: new.clone())
        elif line.kind in ("fill", "add"):
            edit(site, value_of(line), _in_place(line.part, line.kind))
        elif line.kind == "change":
            name, value = line.changes, value_of(line)
            if name not in homes:
                change = _in_place(line.part, "change")
                old = names[name]
                names[name] = _Made(lambda o, v, c=change: c(o.clone(), v), old, value)
                continue
            if homes[name] < 0:
                raise Refused(f"stale edit of {name}")
            edit(site, value, _in_place(line.part, "change"), keep=name)
            names[name] = look(site)
    logits = _run(net, ids, todo)
    return {name: value.get() for name, value in saved.items()} | {"logits": logits}


def _in_place(part: str, kind: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    sign = {"fill": "=", "add": "+=", "change": "*="}[kind]
    code = compile(f"now[{part}] {sign} value", "<edit>", "exec")

    def change(now: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        exec(code, {"now": now, "value": value.clone()})
        return now

    return change


def _run(net: Tower, ids: torch.Tensor, todo: list[list[Callable]]) -> torch.Tensor:
    handles = []
    for (_, path, port), steps in zip(SITES, todo, strict=True):
        module = net.get_submodule(path)

        def apply(now: torch.Tensor, steps: list[Callable] = steps) -> torch.Tensor:
            for step in steps:
                now = step(now)
            return now

        def before(_m: Any, args: tuple, apply: Callable = apply) -> tuple:
            return (apply(args[0]), *args[1:])

        def after(_m: Any, _a: Any, out: Any, apply: Callable = apply) -> Any:
            return (apply(out[0]), *out[1:]) if isinstance(out, tuple) else apply(out)

        if steps and port == "input":
            handles.append(module.register_forward_pre_hook(before))
        elif steps:
            handles.append(module.register_forward_hook(after))
    try:
        with torch.no_grad():
            return net(ids)
    finally:
        for handle in handles:
            handle.remove()


def constants() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randn(BATCH, LENGTH, WIDTH, generator=draw) for name in ("c0", "c1")}
