"""A model's card: its tree, shape rules, configuration and tokenizer as data, for clients.

    card(known, "gpt2")                       # wire.messages.ModelCard

Nothing of it is code, and no path or file name of this machine is in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import nn

from weft.kernels.aval import dtype_name
from weft.wire.messages import ModelCard, ModelInfo, ModuleCard, TensorCard

from .fingerprint import scrubbed
from .known import Known
from .rules import Prover
from .speaking import tokenizer_card

_BASES = {nn.Sequential: "sequential", nn.ModuleList: "list", nn.ModuleDict: "dict"}
_PLAIN = (bool, int, float, str, type(None))
_PRIVATE = frozenset({"_name_or_path", "name_or_path", "_commit_hash", "auto_map"})
_LONGEST = 200


def card(known: Known, id: str) -> ModelCard:
    """The card under which a server publishes the model as `id`."""
    facts = known.facts
    language: dict[str, Any] = {}
    if facts is not None:
        language = {
            "takes": tuple(sorted(facts.takes)),
            "takes_any": facts.takes_any,
            "model_type": facts.model_type,
            "vocab": facts.vocab,
            "positions": facts.positions,
            "pad": facts.pad,
            "attention": facts.attention,
        }
    return ModelCard(
        info=_info(known, id),
        modules=tuple(_modules(known.skeleton)),
        config=_configuration(known.skeleton),
        generation=_generation(known.skeleton),
        tokenizer=tokenizer_card(known.tokenizer),
        source=known.source,
        **language,
    )


def _info(known: Known, id: str) -> ModelInfo:
    parameters = list(known.skeleton.parameters())
    return ModelInfo(
        id=id,
        family=known.family,
        class_name=type(known.skeleton).__name__,
        fingerprint=known.fingerprint,
        dtype=_main_dtype(parameters),
        parameters=sum(tensor.numel() for tensor in parameters),
    )


def _main_dtype(tensors: list[nn.Parameter]) -> str:
    """The dtype of most of the weights; "" where there are none."""
    counted: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        counted[tensor.dtype] += tensor.numel()
    return dtype_name(counted.most_common(1)[0][0]) if counted else ""


# -- the tree ------------------------------------------------------------------------------------


def _modules(net: nn.Module) -> Iterator[ModuleCard]:
    """Each module before those in it."""
    prover = Prover()
    modules: dict[int, str] = {}
    tensors: dict[int, str] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        first = modules.setdefault(id(module), path)
        if first != path:
            yield ModuleCard(path=path, kind=type(module).__name__, of=first)
            continue
        yield ModuleCard(
            path=path,
            kind=type(module).__name__,
            base=_base(module),
            parameters=_tensors(path, module._parameters, tensors),
            buffers=_tensors(path, module._buffers, tensors),
            plain=_plain(module),
            rule=prover.rule_for(module),
            details=_details(module),
        )


def _base(module: nn.Module) -> Any:
    return next((name for cls, name in _BASES.items() if isinstance(module, cls)), "")


def _tensors(path: str, own: dict[str, Any], seen: dict[int, str]) -> tuple[TensorCard, ...]:
    return tuple([_tensor(path, n, t, seen) for n, t in own.items() if t is not None])


def _tensor(path: str, name: str, tensor: torch.Tensor, seen: dict[int, str]) -> TensorCard:
    where = f"{path}.{name}" if path else name
    first = seen.setdefault(id(tensor), where)
    return TensorCard(
        name=name,
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        of=None if first == where else first,
    )


def _plain(module: nn.Module) -> dict[str, Any]:
    """Numbers and words that the module was made with: `num_heads`, `eps`, `layer_idx`."""
    own = {k: v for k, v in vars(module).items() if k[0] != "_" and isinstance(v, _PLAIN)}
    weights = {**module._parameters, **module._buffers}
    own |= dict.fromkeys([name for name, tensor in weights.items() if tensor is None])
    return {k: v for k, v in own.items() if k.isidentifier() and _travels(v)}


def _travels(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST and not is_path(value)
    return not isinstance(value, int) or abs(value) < 2**63


def is_path(text: str) -> bool:
    """Whether a text may be the name of a file of this machine."""
    return (
        PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute() or text[:1] == "~"
    )


def _details(module: nn.Module) -> str:
    """What `print` shows of the module between its brackets, where PyTorch says it."""
    if module._modules and _base(module):
        return ""
    text = module.extra_repr()
    if type(module).__repr__ is not nn.Module.__repr__:
        text = repr(module).removeprefix(f"{type(module).__name__}(").removesuffix(")")
    return text if len(text) <= _LONGEST and text.isprintable() and _is_about_numbers(text) else ""


def _is_about_numbers(text: str) -> bool:
    return not ("/" in text or "\\" in text)


# -- the configuration ---------------------------------------------------------------------------


def _configuration(net: nn.Module) -> dict[str, Any]:
    """The configuration of a `transformers` model, under its general names too."""
    config: Any = getattr(net, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    told = _without_paths(scrubbed(config.to_dict(), _PRIVATE))
    names: dict[str, str] = getattr(config, "attribute_map", {})
    return told | {new: told[old] for new, old in names.items() if old in told and new not in told}


def _generation(net: nn.Module) -> dict[str, Any]:
    """What the model's generation config says: options that a user leaves out have these values."""
    config: Any = getattr(net, "generation_config", None)
    if not hasattr(config, "to_dict"):
        return {}
    told = {name: value for name, value in config.to_dict().items() if _is_plain(value)}
    return _without_paths(scrubbed(told, _PRIVATE))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str)) and _travels(value)


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_paths(v) for k, v in value.items() if not _names_a_file(v)}
    if isinstance(value, list):
        return [_without_paths(item) for item in value if not _names_a_file(item)]
    return value


def _names_a_file(value: Any) -> bool:
    return isinstance(value, str) and is_path(value)
