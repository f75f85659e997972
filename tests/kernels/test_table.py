"""The operation table: complete, closed, and with one meaning per name."""

from __future__ import annotations

import ast
import warnings
from collections import Counter
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, get_overridable_functions

from weft.graph.ops import ALIASES, EXCLUDED, IN_GRAPHS, KINDS, OPS, is_effect, is_random
from weft.kernels.table import FUNCTIONS, NAMES, REASONS, reason, spelled

# What no graph may reach, whatever a table says: memory, files, processes, code.
FORBIDDEN = """
    Tensor.data_ptr Tensor.untyped_storage Tensor.storage Tensor.set_ Tensor.resize_ as_strided
    as_strided_ as_strided_copy as_strided_scatter Tensor.apply_ Tensor.map_ Tensor.map2_
    Tensor.register_hook Tensor.backward Tensor.__reduce_ex__ Tensor.__setstate__ Tensor.new
    Tensor.share_memory_ Tensor.requires_grad_ Tensor.__dlpack__ Tensor.record_stream load save
    from_file frombuffer from_dlpack compile vmap cond while_loop jit empty empty_like empty_strided
    Tensor.new_empty set_default_dtype set_num_threads manual_seed set_rng_state utils hub
    nn.functional.fractional_max_pool2d nn.functional.ctc_loss nn.functional.embedding_bag
"""


def test_every_function_that_torch_hands_over_is_in_the_table_or_has_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functions = [f for group in get_overridable_functions().values() for f in group]
    missing = [spelled(f) for f in functions if f not in NAMES and f not in REASONS]
    assert len(functions) > 1000
    assert missing == []


def test_no_name_stands_in_two_lists() -> None:
    tables = (OPS, ALIASES, EXCLUDED)
    names = Counter(name for table in tables for name in table)
    assert [name for name, times in names.items() if times > 1] == []
    assert not set(NAMES) & set(REASONS)
    assert set(NAMES.values()) == set(FUNCTIONS) == set(OPS)
    assert set(ALIASES.values()) <= set(OPS)


def test_each_name_is_a_function_of_its_own() -> None:
    functions = Counter(found(name) for name in OPS)
    assert [name for name in OPS if functions[found(name)] > 1] == []


def test_reasons_are_sentences_and_kinds_are_known() -> None:
    for name, text in EXCLUDED.items():
        assert len(text.split()) >= 4, name
        assert not text.endswith("."), name
    assert {op.kind for op in OPS.values()} == set(KINDS)


def test_nothing_dangerous_is_in_the_table() -> None:
    assert [name for name in FORBIDDEN.split() if name in OPS] == []
    assert [name for name in OPS if name.startswith(("_", "Tensor._cdata", "ops.", "jit."))] == []
    assert {"look", "asked", "hint", "plain"}.isdisjoint(IN_GRAPHS)


def test_in_place_is_known_by_kind() -> None:
    for name in OPS:
        method = name.removesuffix(".__get__").split(".")[-1]
        in_place = method.endswith("_") and not method.endswith("__")
        in_place |= method in ("__set__", "__setitem__", "__ilshift__", "__irshift__")
        assert is_effect(name) == in_place, name
    assert is_random("randn_like") and is_random("Tensor.normal_") and not is_random("add")


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (Tensor.add, "add"),
        (Tensor.__add__, "add"),
        (Tensor.__radd__, "add"),
        (Tensor.__iadd__, "Tensor.add_"),
        (Tensor.T.__get__, "Tensor.T.__get__"),  # type: ignore[attr-defined]
        (Tensor.data.__get__, "detach"),  # type: ignore[attr-defined]
        (Tensor.__iter__, "unbind"),
        (Tensor.__getitem__, "Tensor.__getitem__"),
        (torch.concat, "cat"),
        (torch.einsum, "einsum"),
        (torch.empty, "zeros"),
        (torch.empty_like, "zeros_like"),
        (Tensor.new_empty, "Tensor.new_zeros"),
        (torch.arange, "arange"),
        (F.adaptive_max_pool2d, "nn.functional.adaptive_max_pool2d"),
        (F.gelu, "nn.functional.gelu"),
        (F.conv1d, "conv1d"),
        (torch._C._VariableFunctions.relu, "relu"),
        (torch._C._nn.scaled_dot_product_attention, "nn.functional.scaled_dot_product_attention"),
    ],
)
def test_functions_have_the_names_that_users_know(function: object, name: str) -> None:
    assert NAMES[function] == name  # type: ignore[index]
    assert reason(function) is None  # type: ignore[arg-type]


def test_a_refused_function_says_why() -> None:
    assert "memory" in (reason(Tensor.data_ptr) or "")
    assert "without the underscore" in (reason(Tensor.squeeze_) or "")
    assert reason(torch.load) == "it is not in the operation table"
    assert spelled(Tensor.data_ptr) == "torch.Tensor.data_ptr"


FACTORIES = """
    zeros ones full arange linspace logspace eye empty rand randn randint randperm normal
    tril_indices triu_indices scalar_tensor full_like zeros_like ones_like empty_like rand_like
    randn_like randint_like hann_window
"""


def test_factories_are_known_as_a_mode_sees_them() -> None:
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.zeros(2), torch.full((2,), 1.0), torch.randn(2), torch.arange(3)
    assert [NAMES.get(function) for function in seen] == ["zeros", "full", "randn", "arange"]
    assert all(getattr(torch, name) in NAMES for name in FACTORIES.split())


def found(name: str) -> object:
    return reduce(getattr, name.split("."), torch)


# Spellings that share a name must take the same calls: torch's own stubs say what each takes.

Signature = tuple[tuple[str, ...], int, str | None, tuple[str, ...]]


def stubs() -> dict[str, set[Signature]]:
    """The signatures, without the tensor itself, of the builtins `x` and methods `Tensor.x`."""
    root = Path(torch.__file__).parent / "_C"
    functions = ast.parse((root / "_VariableFunctions.pyi").read_text()).body
    classes = ast.parse((root / "__init__.pyi").read_text()).body
    tensor = next(c for c in classes if isinstance(c, ast.ClassDef) and c.name == "TensorBase")
    found: dict[str, set[Signature]] = {}
    for prefix, body in (("", functions), ("Tensor.", tensor.body)):
        for node in body:
            if isinstance(node, ast.FunctionDef):
                found.setdefault(prefix + node.name, set()).add(_signature(node))
    return found


def _signature(node: ast.FunctionDef) -> Signature:
    names = [arg.arg for arg in node.args.posonlyargs + node.args.args][1:]
    star = node.args.vararg.arg if node.args.vararg else None
    named = tuple(arg.arg for arg in node.args.kwonlyargs if arg.arg != "out")
    return tuple(names), min(len(node.args.defaults), len(names)), star, named


def test_spellings_that_share_a_name_take_the_same_calls() -> None:
    known = stubs()
    checked, narrower = 0, []
    for spelling in [name for name in known if not name.split(".")[-1].startswith("__")]:
        function = reduce(lambda at, part: getattr(at, part, None), spelling.split("."), torch)
        name = NAMES.get(function) if callable(function) else None  # type: ignore[arg-type]
        if name is None or name == spelling or name not in known:
            continue
        checked += 1
        if not all(covered(signature, known[name]) for signature in known[spelling]):
            narrower.append(spelling)
    assert checked > 300
    assert narrower == ["empty"]  # zeros takes no memory_format


def covered(signature: Signature, wider: set[Signature]) -> bool:
    """Whether one of `wider` has the same arguments, and perhaps further ones by name."""
    names, defaults, star, named = signature
    return any(
        other[0] == names and other[1] >= defaults and other[2] == star and {*named} <= {*other[3]}
        for other in wider
    )
