"""The fingerprint of a model: equal for two models on which one graph means the same.

    fingerprint(net)                          # the same for a skeleton and for the loaded model

It is a SHA-256 over the module tree, the names, shapes and dtypes of parameters and buffers, what
is tied, the configuration, the attention kernel, and the source code of every module class. The
numbers in the weights do not count, nor where they are, nor the files that they came from.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from weft.kernels.aval import dtype_name

from .sources import source_of

# Entries of a configuration that change no number: names, versions, labels, and the dtype, which
# the parameters show.
SILENT = frozenset(
    {
        *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "auto_map"),
        *("architectures", "dtype", "torch_dtype", "id2label", "label2id", "problem_type"),
        *("tokenizer_class", "finetuning_task", "task_specific_params"),
    }
)

_PLAIN = (type(None), bool, int, float, str)


def fingerprint(net: nn.Module) -> str:
    """64 hex digits. Equal for the skeleton of a model and the model itself."""
    told = [_tree(net), _training(net), _configuration(net)]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _tree(net: nn.Module) -> list[Any]:
    modules: dict[int, str] = {}
    tensors: dict[int, str] = {}
    told = []
    for path, module in net.named_modules(remove_duplicate=False):
        first = modules.setdefault(id(module), path)
        if first != path:
            told.append((path, first))
            continue
        weights = [_tensor(path, name, t, tensors) for name, t in own_tensors(module)]
        told.append((path, _kind(module), weights))
    return told


def own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The parameters and buffers that stand in the module itself."""
    both = (*module._parameters.items(), *module._buffers.items())
    return [(name, tensor) for name, tensor in both if tensor is not None]


def _tensor(path: str, name: str, tensor: torch.Tensor, seen: dict[int, str]) -> Any:
    where = f"{path}.{name}" if path else name
    first = seen.setdefault(id(tensor), where)
    return name, dtype_name(tensor.dtype), list(tensor.shape), None if first == where else first


def _kind(module: nn.Module) -> Any:
    """The class by name and by what it says; of PyTorch's own, how it was made."""
    cls = type(module)
    own = cls.__module__.startswith("torch.nn.")
    return f"{cls.__module__}:{cls.__qualname__}", source_of(cls), _made_with(module) if own else []


def _made_with(module: nn.Module) -> list[tuple[str, str]]:
    """The options of one of PyTorch's modules: `eps`, `stride`, `num_heads`."""
    public = [(k, v) for k, v in vars(module).items() if k[0] != "_" and k != "training"]
    return [(k, repr(scrubbed(v))) for k, v in public if isinstance(v, (*_PLAIN, tuple))]


def _training(net: nn.Module) -> list[str]:
    """Where the model is in training mode, which changes numbers."""
    return [path for path, module in net.named_modules() if module.training]


def _configuration(net: nn.Module) -> Any:
    config: Any = getattr(net, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    kernels = [getattr(config, f"_{of}_implementation", None) for of in ("attn", "experts")]
    return [*kernels, scrubbed(config.to_dict(), SILENT)]


def scrubbed(value: Any, without: frozenset[str] = frozenset()) -> Any:
    """Plain data: sorted, without the entries named. Of anything else its class, or its dtype."""
    if isinstance(value, dict):
        items = sorted([(str(key), item) for key, item in value.items()], key=lambda kv: kv[0])
        return {key: scrubbed(item, without) for key, item in items if key not in without}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [scrubbed(item, without) for item in value]
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return value if isinstance(value, _PLAIN) else type(value).__qualname__
