"""The layers of the house: who may import whom, no cycles, and where torch must not be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "weft"

# A folder (or a single file) and the folders of ours that it may import besides itself.
# `errors` is everybody's.
# What a part of the service that loads models may import.
SERVING = ("settings", "graph", "wire", "kernels", "signatures", "run", "families", "engine")
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "graph": set(),
    "wire": {"graph"},
    "kernels": {"graph"},
    "settings": set(),
    "sources": set(),
    "signatures": {"graph", "kernels", "sources"},
    "trace": {"graph", "kernels", "signatures", "sources"},
    "run": {"graph", "kernels", "sources"},
    "families": {"graph", "kernels", "run"},
    "engine": {
        *("settings", "graph", "wire", "kernels", "sources", "signatures", "run", "families"),
    },
    "client": {"settings", "graph", "wire", "kernels/frames"},
    "client/local": {"graph", "wire", "run", "families", "engine"},
    "client/loopback": {"settings", "graph", "wire", "kernels/frames", "engine"},
    "handles": {
        *("settings", "graph", "kernels", "wire", "sources", "signatures", "trace", "families"),
        *("client", "run/estimate", "run/turns", "engine"),
    },
    "service": set(),
    "service/jobs": {"graph"},
    "service/store": {"settings", "graph", "wire", "service/jobs"},
    "service/gateway": {"settings", "graph", "wire", "service/jobs", "service/store"},
    "service/checker": {*SERVING, "service/jobs", "service/store"},
    "service/worker": {*SERVING, "service/jobs", "service/store"},
    "service/sandbox": set(),
    "service/fleet": {
        *(*SERVING, "service/jobs", "service/store", "service/sandbox"),
        *("service/gateway", "service/checker", "service/worker"),
    },
    "testing": {"__init__"},
    "testing/leash": {"cli"},
    "testing/process": {"settings"},
    "testing/service": {"__init__", "settings", "service", "engine", "client", "handles"},
    "demo": {"__init__", "testing"},
    "commands": {
        *("__init__", "settings", "demo", "handles/experiment", "service/fleet", "client", "wire"),
    },
    "cli": {"commands"},
    "__init__": {"errors", "graph", "handles", "client"},
    "__main__": {"cli"},
}

WITHOUT_TORCH = (
    *("weft", "weft.errors", "weft.graph.check", "weft.graph.show"),
    *("weft.sources.source", "weft.sources.stand"),
    *("weft.wire.codec", "weft.wire.frames", "weft.wire.messages"),
    *("weft.wire.reports", "weft.wire.results", "weft.wire.structures"),
    *("weft.service.jobs.life", "weft.service.store.sqlite", "weft.service.store.folder"),
    *("weft.service.store.memory", "weft.service.store.keys", "weft.service.store.shell"),
    *("weft.service.sandbox.confine", "weft.service.sandbox.means"),
    *("weft.service.fleet.doctor", "weft.service.fleet.checkup"),
    *("weft.service.store.sweep", "weft.service.store.lock", "weft.service.store.requests"),
)


def files() -> list[Path]:
    return sorted(path for path in SRC.rglob("*.py"))


def name_of(path: Path) -> str:
    """`graph/node` for src/weft/graph/node.py."""
    return str(path.relative_to(SRC).with_suffix(""))


def imported(path: Path) -> set[str]:
    """The files of ours that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "weft"}
        elif isinstance(node, ast.ImportFrom):
            found |= _targets(node, path)
    return {_file(target) for target in found}


def _targets(node: ast.ImportFrom, path: Path) -> set[str]:
    if node.level:
        package = ["weft", *path.relative_to(SRC).parent.parts]
        base = ".".join(package[: len(package) - node.level + 1])
        module = f"{base}.{node.module}" if node.module else base
    else:
        module = node.module or ""
    if module.split(".")[0] != "weft":
        return set()
    return {
        f"{module}.{alias.name}" if _is_module(f"{module}.{alias.name}") else module
        for alias in node.names
    }


def _is_module(dotted: str) -> bool:
    place = SRC.joinpath(*dotted.split(".")[1:])
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


def _file(dotted: str) -> str:
    parts = dotted.split(".")[1:]
    place = SRC.joinpath(*parts)
    return "/".join(parts) if place.with_suffix(".py").exists() else "/".join([*parts, "__init__"])


def layer_of(name: str) -> str:
    """The longest entry of the table that a file falls under."""
    parts = name.split("/")
    fitting = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((entry for entry in fitting if entry in LAYERS), parts[0])


def room_of(name: str) -> str:
    """The folder that a file lies in, as the table names it; the service has several."""
    parts = name.split("/")
    return "/".join(parts[:2]) if parts[0] == "service" else parts[0]


def allowed(source: str, target: str) -> bool:
    if target == "errors" or room_of(target) == room_of(source):
        return True
    rooms = LAYERS[layer_of(source)]
    parts = target.split("/")
    return any("/".join(parts[:n]) in rooms for n in range(1, len(parts) + 1))


def test_every_file_has_a_layer() -> None:
    assert {layer_of(name_of(path)) for path in files()} <= set(LAYERS)


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_a_file_imports_only_from_the_layers_it_may(path: Path) -> None:
    name = name_of(path)
    wrong = sorted(target for target in imported(path) if not allowed(name, target))
    assert not wrong, f"{name} imports {wrong}"


def test_trace_and_run_never_meet() -> None:
    assert "run" not in LAYERS["trace"]
    assert "trace" not in LAYERS["run"]


def test_imports_have_no_cycle() -> None:
    edges = {name_of(path): at_load(path) for path in files()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join([*trail, name])}"
        if name in done:
            return
        for target in sorted(edges.get(name, ())):
            visit(target, (*trail, name))
        done.add(name)

    for name in edges:
        visit(name, ())


def at_load(path: Path) -> set[str]:
    """What is imported for real: not under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    text = ast.unparse(tree)
    kept = ast.parse(text)
    found: set[str] = set()
    for node in ast.walk(kept):
        if isinstance(node, ast.ImportFrom):
            found |= {_file(target) for target in _targets(node, path)}
    return found


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_torch_is_not_loaded_by(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_walk_would_see_a_forbidden_import(tmp_path: Path) -> None:
    node = ast.parse("from weft.run import run").body[0]
    assert isinstance(node, ast.ImportFrom)
    target = _file(next(iter(_targets(node, SRC / "trace" / "value.py"))))
    assert not allowed("trace/value", target)
