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
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "graph": set(),
    "wire": {"graph"},
    "kernels": {"graph"},
    "trace": {"graph", "kernels"},
    "run": {"graph", "kernels"},
    "families": {"graph", "kernels", "run"},
    "client": {"graph", "wire"},
    "client/local": {"graph", "wire", "run", "families"},
    "models": {"graph", "kernels", "wire", "trace", "families", "client", "run/price"},
    "testing": {"__init__"},
    "demo": {"__init__", "testing"},
    "cli": {"__init__", "demo", "models/experiment"},
    "__init__": {"errors", "graph", "models"},
}

WITHOUT_TORCH = ("weft", "weft.errors", "weft.graph.check", "weft.graph.show", "weft.wire.codec")


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
    return name if name in LAYERS else name.split("/")[0]


def allowed(source: str, target: str) -> bool:
    own = layer_of(source)
    if target.split("/")[0] == own.split("/")[0] or target == "errors":
        return True
    rooms = LAYERS[own]
    return target in rooms or target.split("/")[0] in rooms


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
